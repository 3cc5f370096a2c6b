/* Writing and comparing many ranges of a file in one call each. See distckpt/storage/direct_io.py for why.
 *
 * A chunk is a tuple of an offset in the file and an object with a buffer, which cannot be resized meanwhile.
 *
 * The module uses Python's stable ABI of 3.11.
 */

#define _FILE_OFFSET_BITS 64
#define _GNU_SOURCE /* SEEK_HOLE */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK_BYTES 4096 /* what O_DIRECT needs memory, offset and length to be multiples of */
#define COMPARE_BYTES (1 << 20)

typedef struct {
    Py_buffer buffer;
    off_t offset;
    int is_bytes; /* a `bytes` object */
} Chunk;

/* --- chunks --------------------------------------------------------------------------------------------------- */

static void release(Chunk *chunks, Py_ssize_t num_chunks)
{
    for (Py_ssize_t at = 0; at < num_chunks; at++)
        PyBuffer_Release(&chunks[at].buffer);
    PyMem_Free(chunks);
}

/* Return the chunks of a sequence, for `release`; NULL for an error. */
static Chunk *chunks_of(PyObject *sequence, Py_ssize_t *num_chunks)
{
    Py_ssize_t at = 0;
    PyObject *list = PySequence_List(sequence);
    if (!list)
        return NULL;
    *num_chunks = PyList_Size(list);
    Chunk *chunks = PyMem_Calloc(*num_chunks ? (size_t)*num_chunks : 1, sizeof *chunks);
    if (!chunks) {
        Py_DECREF(list);
        PyErr_NoMemory();
        return NULL;
    }
    for (; at < *num_chunks; at++) {
        PyObject *pair = PyList_GetItem(list, at);
        if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2) {
            PyErr_SetString(PyExc_TypeError, "a chunk is no tuple of an offset and bytes");
            break;
        }
        const long long offset = PyLong_AsLongLong(PyTuple_GetItem(pair, 0));
        if ((offset == -1 && PyErr_Occurred()) ||
            PyObject_GetBuffer(PyTuple_GetItem(pair, 1), &chunks[at].buffer, PyBUF_SIMPLE))
            break;
        chunks[at].offset = (off_t)offset;
        chunks[at].is_bytes = PyBytes_Check(PyTuple_GetItem(pair, 1));
    }
    Py_DECREF(list); /* each buffer holds its object */
    if (at < *num_chunks) {
        release(chunks, at);
        return NULL;
    }
    return chunks;
}

/* --- writing -------------------------------------------------------------------------------------------------- */

/* Return 1 if O_DIRECT can write the chunk. `bytes` can be aligned by chance only: they always take the page cache. */
static int is_aligned(const Chunk *chunk)
{
    const uintptr_t bits = (uintptr_t)chunk->buffer.buf | (uintptr_t)chunk->buffer.len | (uintptr_t)chunk->offset;
    return bits % BLOCK_BYTES == 0 && !chunk->is_bytes;
}

static PyObject *write_chunks(PyObject *module, PyObject *arguments)
{
    int fd, direct, code = 0;
    PyObject *sequence;
    Py_ssize_t num_chunks, done = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "iiO:write", &fd, &direct, &sequence))
        return NULL;
    Chunk *chunks = chunks_of(sequence, &num_chunks);
    if (!chunks)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (; done < num_chunks; done++) {
        const Chunk *chunk = &chunks[done];
        const size_t num_bytes = (size_t)chunk->buffer.len;
        const int is_direct = direct >= 0 && is_aligned(chunk);
        ssize_t written = pwrite(is_direct ? direct : fd, chunk->buffer.buf, num_bytes, chunk->offset);
        if (is_direct && written < 0 && errno == EINVAL) /* O_DIRECT needs another alignment here */
            written = pwrite(fd, chunk->buffer.buf, num_bytes, chunk->offset);
        if (written < 0 && errno != EINTR)
            code = errno;
        if (written == 0 && num_bytes) /* a file system that takes no bytes */
            code = EIO;
        if (written != chunk->buffer.len)
            break;
    }
    Py_END_ALLOW_THREADS
    release(chunks, num_chunks);
    if (code) {
        errno = code;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSsize_t(done);
}

/* --- checking ------------------------------------------------------------------------------------------------- */

/* Return 1 if a file has the chunk's bytes, 0 if it has others or ends before, and -1 for an error in errno. */
static int has_bytes(int fd, const Chunk *chunk, char *memory)
{
    Py_ssize_t done = 0;
    while (done < chunk->buffer.len) {
        const Py_ssize_t rest = chunk->buffer.len - done;
        const size_t most = (size_t)(rest < COMPARE_BYTES ? rest : COMPARE_BYTES);
        const ssize_t num_read = pread(fd, memory, most, chunk->offset + done);
        if (num_read < 0)
            return -1;
        if (num_read == 0 || memcmp(memory, (const char *)chunk->buffer.buf + done, (size_t)num_read))
            return 0;
        done += num_read;
    }
    return 1;
}

static PyObject *find_difference(PyObject *module, PyObject *arguments)
{
    int fd, is_equal = 1, code = 0;
    PyObject *sequence;
    Py_ssize_t num_chunks, at = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "iO:find_difference", &fd, &sequence))
        return NULL;
    Chunk *chunks = chunks_of(sequence, &num_chunks);
    if (!chunks)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    char *memory = malloc(COMPARE_BYTES);
    code = memory ? 0 : ENOMEM;
    while (memory && at < num_chunks && (is_equal = has_bytes(fd, &chunks[at], memory)) == 1)
        at++;
    if (is_equal < 0)
        code = errno;
    free(memory);
    Py_END_ALLOW_THREADS
    release(chunks, num_chunks);
    if (code) {
        errno = code;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSsize_t(at < num_chunks ? at : -1);
}

static PyObject *has_hole(PyObject *module, PyObject *arguments)
{
    int fd, is_found = 0;
    PyObject *target;
    Py_buffer ranges;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "iO:has_hole", &fd, &target) || PyObject_GetBuffer(target, &ranges, PyBUF_SIMPLE))
        return NULL;
    const Py_ssize_t num_ranges = ranges.len / (Py_ssize_t)(2 * sizeof(int64_t));
    Py_BEGIN_ALLOW_THREADS
    off_t hole = -1; /* the first one from a range's begin on; a file ends with one */
    for (Py_ssize_t at = 0; at < num_ranges && !is_found; at++) {
        int64_t range[2];
        memcpy(range, (const char *)ranges.buf + at * (Py_ssize_t)sizeof range, sizeof range);
        if (range[0] >= range[1])
            continue;
        if (hole < range[0])
            hole = lseek(fd, range[0], SEEK_HOLE);
        if (hole < 0) {
            is_found = errno == ENXIO; /* past the file's end; after other errors, the file system cannot tell */
            break;
        }
        is_found = hole < range[1];
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&ranges);
    return PyBool_FromLong(is_found);
}

static PyMethodDef functions[] = {
    { "write", write_chunks, METH_VARARGS,
      "write(fd, direct, chunks)\n--\n\n"
      "Write chunks, and return how many were written. It stops before one of which not all was written, without an\n"
      "error or because of a signal. A chunk with aligned memory, offset and length is written to `direct`, a descriptor\n"
      "with O_DIRECT or -1, if it can be." },
    { "find_difference", find_difference, METH_VARARGS,
      "find_difference(fd, chunks)\n--\n\n"
      "Return the index of the first chunk whose bytes a file does not have; -1 if it has all." },
    { "has_hole", has_hole, METH_VARARGS,
      "has_hole(fd, ranges)\n--\n\n"
      "Return True if the file system reports a hole in one of the ranges: pairs of int64, in ascending order." },
    { NULL, NULL, 0, NULL },
};

static PyModuleDef_Slot slots[] = { { 0, NULL } };

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "chunks",
    .m_doc = "Writing and comparing many ranges of a file in one call each.",
    .m_size = 0,
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit_chunks(void)
{
    return PyModuleDef_Init(&definition);
}
