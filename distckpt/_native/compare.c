/* Attributes and memory layouts of many objects, compared with known ones. See distckpt/_compare.py for why.
 *
 * Layouts are read through DLPack's exchange API, a table of C functions that torch 2.10 and later offer. The types below
 * are those of dlpack.h 1.3 (https://github.com/dmlc/dlpack); they are the same in all versions 1.x.
 *
 * The module uses Python's stable ABI of 3.11.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <stdint.h>
#include <string.h>

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits; /* of the elements' type */
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct {
    uint32_t major, minor; /* version */
    void *previous;
    void *functions[3];
    int (*dltensor_from_py_object_no_sync)(void *object, DLTensor *found);
    void *current_work_stream;
} DLPackExchangeAPI;

#define NUM_FIXED 7 /* numbers of a layout before shape and strides, see _compare.py */

/* --- attributes ----------------------------------------------------------------------------------------------- */

/* Return 1 if the object's attributes, and what its methods return, equal the row; 0 if not, and -1 for an error. */
static int has_values(PyObject *object, PyObject *row, PyObject *attributes, PyObject *methods)
{
    const Py_ssize_t num_attributes = PyTuple_Size(attributes), num_methods = PyTuple_Size(methods);
    if (!PyTuple_Check(row) || PyTuple_Size(row) != num_attributes + num_methods) {
        PyErr_SetString(PyExc_ValueError, "a row is no tuple of one value for each attribute and method");
        return -1;
    }
    for (Py_ssize_t at = 0; at < num_attributes + num_methods; at++) {
        PyObject *value = at < num_attributes
                              ? PyObject_GetAttr(object, PyTuple_GetItem(attributes, at))
                              : PyObject_CallMethodObjArgs(object, PyTuple_GetItem(methods, at - num_attributes), NULL);
        if (!value)
            return -1;
        PyObject *known = PyTuple_GetItem(row, at);
        const int is_equal = value == known ? 1 : PyObject_RichCompareBool(value, known, Py_EQ);
        Py_DECREF(value);
        if (is_equal < 1)
            return is_equal;
    }
    return 1;
}

static PyObject *have_values(PyObject *module, PyObject *arguments)
{
    PyObject *objects, *rows, *attributes, *methods;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "O!O!O!O!:have_values", &PyList_Type, &objects, &PyList_Type, &rows, &PyTuple_Type,
                          &attributes, &PyTuple_Type, &methods))
        return NULL;
    if (PyList_Size(objects) != PyList_Size(rows)) {
        PyErr_SetString(PyExc_ValueError, "there are not as many rows as objects");
        return NULL;
    }
    int are_equal = 1;
    for (Py_ssize_t number = 0; are_equal == 1 && number < PyList_Size(objects); number++) {
        PyObject *object = PyList_GetItem(objects, number), *row = PyList_GetItem(rows, number);
        if (!object || !row) /* an attribute has made a list shorter */
            return NULL;
        Py_INCREF(object);
        Py_INCREF(row);
        are_equal = has_values(object, row, attributes, methods);
        Py_DECREF(object);
        Py_DECREF(row);
    }
    return are_equal < 0 ? NULL : PyBool_FromLong(are_equal);
}

/* --- layouts -------------------------------------------------------------------------------------------------- */

/* Return 1 if a tensor has a layout, which is bytes, and 0 if not. */
static int has_layout(const DLTensor *found, const char *layout, Py_ssize_t num_bytes)
{
    const int64_t fixed[NUM_FIXED - 1] = { found->code, found->bits, found->lanes, found->device_type, found->device_id,
                                           found->ndim };
    const size_t num_sizes = found->ndim < 0 ? 0 : (size_t)found->ndim * sizeof(int64_t);
    if (num_bytes != (Py_ssize_t)(NUM_FIXED * sizeof(int64_t) + 2 * num_sizes) ||
        memcmp(layout + sizeof(int64_t), fixed, sizeof fixed))
        return 0;
    layout += NUM_FIXED * sizeof(int64_t);
    return !num_sizes || (found->shape && found->strides && !memcmp(layout, found->shape, num_sizes) &&
                          !memcmp(layout + num_sizes, found->strides, num_sizes));
}

static PyObject *have_layouts(PyObject *module, PyObject *arguments)
{
    PyObject *capsule, *objects, *layouts, *target;
    Py_buffer addresses;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OO!O!O:have_layouts", &capsule, &PyList_Type, &objects, &PyList_Type, &layouts,
                          &target))
        return NULL;
    const DLPackExchangeAPI *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!api)
        return NULL;
    if (api->major != 1 || !api->dltensor_from_py_object_no_sync) {
        PyErr_SetString(PyExc_ValueError, "the exchange API has another version");
        return NULL;
    }
    if (PyObject_GetBuffer(target, &addresses, PyBUF_WRITABLE))
        return NULL;
    const Py_ssize_t num_objects = PyList_Size(objects);
    int are_equal = 1;
    if (num_objects != PyList_Size(layouts) || addresses.len != num_objects * (Py_ssize_t)sizeof(uint64_t)) {
        PyErr_SetString(PyExc_ValueError, "there are not as many layouts and addresses as objects");
        are_equal = -1;
    }
    for (Py_ssize_t number = 0; are_equal == 1 && number < num_objects; number++) {
        DLTensor found;
        char *layout;
        Py_ssize_t num_bytes;
        int64_t begin;
        PyObject *object = PyList_GetItem(objects, number), *known = PyList_GetItem(layouts, number);
        if (!object || !known || PyBytes_AsStringAndSize(known, &layout, &num_bytes) ||
            api->dltensor_from_py_object_no_sync(object, &found)) {
            are_equal = -1;
            break;
        }
        are_equal = has_layout(&found, layout, num_bytes);
        if (are_equal) {
            memcpy(&begin, layout, sizeof begin);
            const uint64_t at = (uint64_t)(uintptr_t)found.data + found.byte_offset - (uint64_t)begin;
            memcpy((char *)addresses.buf + number * (Py_ssize_t)sizeof at, &at, sizeof at);
        }
    }
    PyBuffer_Release(&addresses);
    return are_equal < 0 ? NULL : PyBool_FromLong(are_equal);
}

static PyMethodDef functions[] = {
    { "have_values", have_values, METH_VARARGS,
      "have_values(objects, rows, attributes, methods)\n--\n\n"
      "Return True if each object's attributes, and what its methods return, equal its row." },
    { "have_layouts", have_layouts, METH_VARARGS,
      "have_layouts(api, objects, layouts, addresses)\n--\n\n"
      "Return True if each tensor has its layout, and store the addresses of their memory." },
    { NULL, NULL, 0, NULL },
};

static PyModuleDef_Slot slots[] = { { 0, NULL } };

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "compare",
    .m_doc = "Attributes and memory layouts of many objects, compared with known ones.",
    .m_size = 0,
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit_compare(void)
{
    return PyModuleDef_Init(&definition);
}
