/* CRC-32 of bytes in memory, alone or of bytes that are copied meanwhile. See distckpt/_checksum.py for why.
 *
 * Method: V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009.
 * A block of data is a polynomial over GF(2), and its CRC is the remainder modulo P. Folding replaces 16 bytes by 16
 * bytes that lie D bits later and have the same remainder:
 *
 *     (H * x^64 + L) * x^D  =  H * (x^(D+64) mod P) + L * (x^D mod P)      (mod P)
 *
 * Each product of 64 by 32 bits fits into the 128 bits there. So a loop that holds one block in registers folds it onto
 * the next block, and the CRC of the last block, which is left in the end, is the CRC of all.
 *
 * zip's CRC is bit-reflected: bit 0 of a byte is the coefficient of the highest power. Two things follow. A carry-less
 * product of reflected numbers comes out one bit too low, so each factor is shifted left by one. And a remainder of 32
 * bits stands in the low half of its 64-bit word, where it counts as x^32 times itself. Hence the powers D + 32, for H
 * (the half of a register with the lower address), and D - 32, for L. `power_of_x` computes them from P, so that this
 * file has no other constant. For D = 512 they are 0x154442bd4 and 0x1c6e41596, as in Linux's crc32-pclmul_asm.S.
 *
 * Every kernel reads each byte of the source once. What it stores and what it checks are the same, whatever another
 * thread writes meanwhile; KEEP stops the compiler from reading a second time.
 *
 * The module uses Python's stable ABI of 3.11, the first that has the buffer protocol.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && defined(__linux__) && defined(__x86_64__)
#define ON_X86 1
#include <immintrin.h>
#elif defined(__GNUC__) && defined(__linux__) && defined(__aarch64__) && defined(__AARCH64EL__)
#define ON_ARM 1
#include <arm_neon.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define POLYNOMIAL 0xEDB88320u /* P without x^32, reflected: ISO 3309, RFC 1952 section 8 */
#define MAX_BLOCK 256
#define CACHE_LINE 64
#define PREFETCH_BYTES 2048  /* how far ahead of the copy, by trial */
#define ROWS_AHEAD 8         /* prefetched rows of a table */
#define LEAST_UNLOCKED 16384 /* bytes; less takes 1 to 2 us, and the GIL is kept */

#define KEEP(vector, place) __asm__ volatile("" : "+" place(vector)) /* no reading again: see above */

#define INLINE static inline __attribute__((always_inline))

/* --- by table: the ends of a range, and what is left of the folding ------------------------------------------- */

static uint32_t tables[8][256]; /* tables[k][b]: the remainder of byte b with k bytes of zeros after it */

static void fill_tables(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++)
            value = (value >> 1) ^ (value & 1 ? POLYNOMIAL : 0);
        tables[0][byte] = value;
    }
    for (int k = 1; k < 8; k++)
        for (int byte = 0; byte < 256; byte++)
            tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 0xFF];
}

/* Fold some bytes into the register (the CRC, inverted). They are copied first where `to` is given. */
static uint32_t by_table(uint8_t *to, const uint8_t *from, size_t num_bytes, uint32_t state)
{
    for (; num_bytes >= 8; num_bytes -= 8, from += 8) {
        uint64_t word;
        memcpy(&word, from, 8);
        KEEP(word, "r");
        if (to) {
            memcpy(to, &word, 8);
            to += 8;
        }
        word ^= state; /* the machines that have a kernel are little-endian */
        state = 0;
        for (int i = 0; i < 8; i++)
            state ^= tables[7 - i][(word >> 8 * i) & 0xFF];
    }
    for (; num_bytes; num_bytes--) {
        uint32_t byte = *from++;
        KEEP(byte, "r");
        if (to)
            *to++ = (uint8_t)byte;
        state = (state >> 8) ^ tables[0][(state ^ byte) & 0xFF];
    }
    return state;
}

/* --- kernels -------------------------------------------------------------------------------------------------- */

/* Copy `num_blocks` blocks (at least one) unless `to` is NULL, and fold them into the last one, `left`. Targets are
 * aligned to a vector; sources need not be. `factors` are those of the kernel's block. */
typedef void Fold(uint8_t *to, const uint8_t *from, size_t num_blocks, uint32_t state, const uint64_t factors[2],
                  uint8_t left[MAX_BLOCK]);

/* Define fold_NAME: a block is four vectors, so that four foldings are under way at once. TARGET says which
 * instructions the compiler may use. Of each kernel there are further:
 *
 *     factors_NAME  the two factors, once for every 128 bits of a vector
 *     read_NAME     one vector of data, stored where there is a target
 *     onto_NAME     the data, plus a vector that is folded onto it
 *     state_NAME    the register in the first four bytes of a vector of zeros
 *     store_NAME    a vector, anywhere
 *     xor_NAME      of two vectors
 */
#define DEFINE_FOLD(NAME, TARGET, VECTOR)                                                                            \
    TARGET INLINE void blocks_##NAME(uint8_t *to, const uint8_t *from, size_t num_blocks, uint32_t state,            \
                                     const uint64_t *factors, uint8_t *left)                                         \
    {                                                                                                                \
        const size_t size = sizeof(VECTOR);                                                                          \
        const VECTOR by = factors_##NAME(factors);                                                                   \
        VECTOR a = read_##NAME(to, from), b = read_##NAME(to ? to + size : NULL, from + size);                       \
        VECTOR c = read_##NAME(to ? to + 2 * size : NULL, from + 2 * size);                                          \
        VECTOR d = read_##NAME(to ? to + 3 * size : NULL, from + 3 * size);                                          \
        a = xor_##NAME(a, state_##NAME(state));                                                                      \
        while (--num_blocks) {                                                                                       \
            from += 4 * size;                                                                                        \
            to = to ? to + 4 * size : NULL;                                                                          \
            for (size_t at = 0; at < 4 * size; at += CACHE_LINE)                                                     \
                __builtin_prefetch(from + PREFETCH_BYTES + at);                                                      \
            a = onto_##NAME(read_##NAME(to, from), a, by);                                                           \
            b = onto_##NAME(read_##NAME(to ? to + size : NULL, from + size), b, by);                                 \
            c = onto_##NAME(read_##NAME(to ? to + 2 * size : NULL, from + 2 * size), c, by);                         \
            d = onto_##NAME(read_##NAME(to ? to + 3 * size : NULL, from + 3 * size), d, by);                         \
        }                                                                                                            \
        store_##NAME(left, a);                                                                                       \
        store_##NAME(left + size, b);                                                                                \
        store_##NAME(left + 2 * size, c);                                                                            \
        store_##NAME(left + 3 * size, d);                                                                            \
    }                                                                                                                \
    TARGET static void fold_##NAME(uint8_t *to, const uint8_t *from, size_t num_blocks, uint32_t state,              \
                                   const uint64_t factors[2], uint8_t left[MAX_BLOCK])                               \
    {                                                                                                                \
        if (to)                                                                                                      \
            blocks_##NAME(to, from, num_blocks, state, factors, left);                                               \
        else                                                                                                         \
            blocks_##NAME(NULL, from, num_blocks, state, factors, left);                                             \
    }

#if ON_X86

/* Stores go past the caches, so that a training step finds its own data there. `run` orders them by a fence. */

/* 512 bits: VPCLMULQDQ with AVX-512, Intel since Ice Lake (2019), AMD since Zen 4 (2022). */
#define AVX512 __attribute__((target("avx512f,avx512vl,vpclmulqdq")))

AVX512 INLINE __m512i factors_avx512(const uint64_t *factors)
{
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)factors));
}

AVX512 INLINE __m512i read_avx512(uint8_t *to, const uint8_t *from)
{
    __m512i data = _mm512_loadu_si512(from);
    KEEP(data, "v");
    if (to)
        _mm512_stream_si512((void *)to, data);
    return data;
}

AVX512 INLINE __m512i onto_avx512(__m512i data, __m512i folded, __m512i by)
{
    const __m512i first = _mm512_clmulepi64_epi128(folded, by, 0x00);
    return _mm512_ternarylogic_epi64(first, _mm512_clmulepi64_epi128(folded, by, 0x11), data, 0x96); /* xor of three */
}

AVX512 INLINE __m512i state_avx512(uint32_t state)
{
    return _mm512_maskz_set1_epi32(1, (int)state);
}

AVX512 INLINE void store_avx512(uint8_t *to, __m512i data)
{
    _mm512_storeu_si512(to, data);
}

AVX512 INLINE __m512i xor_avx512(__m512i one, __m512i other)
{
    return _mm512_xor_si512(one, other);
}

DEFINE_FOLD(avx512, AVX512, __m512i)

static int has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("vpclmulqdq");
}

/* 256 bits: VPCLMULQDQ with AVX2, AMD since Zen 3 (2020), Intel since Ice Lake (2019). */
#define AVX2 __attribute__((target("avx2,vpclmulqdq")))

AVX2 INLINE __m256i factors_avx2(const uint64_t *factors)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)factors));
}

AVX2 INLINE __m256i read_avx2(uint8_t *to, const uint8_t *from)
{
    __m256i data = _mm256_loadu_si256((const __m256i *)from);
    KEEP(data, "x");
    if (to)
        _mm256_stream_si256((__m256i *)to, data);
    return data;
}

AVX2 INLINE __m256i xor_avx2(__m256i one, __m256i other)
{
    return _mm256_xor_si256(one, other);
}

AVX2 INLINE __m256i onto_avx2(__m256i data, __m256i folded, __m256i by)
{
    const __m256i first = _mm256_clmulepi64_epi128(folded, by, 0x00);
    return xor_avx2(xor_avx2(data, first), _mm256_clmulepi64_epi128(folded, by, 0x11));
}

AVX2 INLINE __m256i state_avx2(uint32_t state)
{
    return _mm256_setr_epi32((int)state, 0, 0, 0, 0, 0, 0, 0);
}

AVX2 INLINE void store_avx2(uint8_t *to, __m256i data)
{
    _mm256_storeu_si256((__m256i *)to, data);
}

DEFINE_FOLD(avx2, AVX2, __m256i)

static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("vpclmulqdq");
}

/* There is no kernel for PCLMULQDQ alone, on 128 bits: on AMD Zen 5 it took 1.4 times as long as an ordinary copy, and
 * no less than `memmove` and `isal`, one after the other. */

#elif ON_ARM

/* PMULL of the cryptographic extension, in Arm's server processors. GCC has no intrinsic for STNP, the store past the
 * caches, so the stores are ordinary ones. */
#define PMULL __attribute__((target("+crypto")))

PMULL INLINE uint8x16_t factors_pmull(const uint64_t *factors)
{
    return vreinterpretq_u8_u64(vld1q_u64(factors));
}

PMULL INLINE uint8x16_t read_pmull(uint8_t *to, const uint8_t *from)
{
    uint8x16_t data = vld1q_u8(from);
    KEEP(data, "w");
    if (to)
        vst1q_u8(to, data);
    return data;
}

PMULL INLINE uint8x16_t xor_pmull(uint8x16_t one, uint8x16_t other)
{
    return veorq_u8(one, other);
}

PMULL INLINE uint8x16_t onto_pmull(uint8x16_t data, uint8x16_t folded, uint8x16_t by)
{
    const poly64x2_t halves = vreinterpretq_p64_u8(folded), factors = vreinterpretq_p64_u8(by);
    const poly128_t first = vmull_p64(vgetq_lane_p64(halves, 0), vgetq_lane_p64(factors, 0));
    const poly128_t second = vmull_high_p64(halves, factors);
    return xor_pmull(xor_pmull(data, vreinterpretq_u8_p128(first)), vreinterpretq_u8_p128(second));
}

PMULL INLINE uint8x16_t state_pmull(uint32_t state)
{
    return vreinterpretq_u8_u32(vsetq_lane_u32(state, vdupq_n_u32(0), 0));
}

PMULL INLINE void store_pmull(uint8_t *to, uint8x16_t data)
{
    vst1q_u8(to, data);
}

DEFINE_FOLD(pmull, PMULL, uint8x16_t)

static int has_pmull(void)
{
    return (getauxval(AT_HWCAP) & HWCAP_PMULL) != 0;
}

#endif

/* --- which kernels this machine can run ----------------------------------------------------------------------- */

typedef struct {
    const char *name;
    int (*is_supported)(void);
    Fold *fold;
    size_t vector_bytes;
    uint64_t factors[2]; /* filled in by set_up */
} Kernel;

static Kernel all_kernels[] = { /* the fastest first */
#if ON_X86
    { "avx512", has_avx512, fold_avx512, 64, { 0, 0 } },
    { "avx2", has_avx2, fold_avx2, 32, { 0, 0 } },
#elif ON_ARM
    { "pmull", has_pmull, fold_pmull, 16, { 0, 0 } },
#endif
    { NULL, NULL, NULL, 0, { 0, 0 } },
};

/* Return x^power mod P, reflected, in the form of a factor: shifted left by one. */
static uint64_t power_of_x(size_t power)
{
    uint32_t value = 0x80000000u; /* x^0 */
    while (power--)
        value = (value >> 1) ^ (value & 1 ? POLYNOMIAL : 0);
    return (uint64_t)value << 1;
}

/* Return the CRC-32 of `num_bytes` bytes and of what stands before them; copy them unless `to` is NULL. */
static uint32_t run(const Kernel *kernel, uint8_t *to, const uint8_t *from, size_t num_bytes, uint32_t before)
{
    uint32_t state = ~before;
    const size_t block_bytes = 4 * kernel->vector_bytes;
    const size_t num_before = to ? -(uintptr_t)to & (kernel->vector_bytes - 1) : 0; /* to the target's alignment */
    if (num_bytes >= num_before + block_bytes) {
        uint8_t left[MAX_BLOCK];
        state = by_table(to, from, num_before, state);
        from += num_before;
        num_bytes -= num_before;
        if (to)
            to += num_before;
        const size_t num_blocks = num_bytes / block_bytes;
        kernel->fold(to, from, num_blocks, state, kernel->factors, left);
#if ON_X86
        _mm_sfence(); /* stores past the caches are ordered with others only by this */
#endif
        state = by_table(NULL, left, block_bytes, 0);
        const size_t num_folded = num_blocks * block_bytes;
        from += num_folded;
        num_bytes -= num_folded;
        if (to)
            to += num_folded;
    }
    return ~by_table(to, from, num_bytes, state);
}

/* --- for Python ----------------------------------------------------------------------------------------------- */

static const Kernel *kernel_named(const char *name)
{
    for (const Kernel *kernel = all_kernels; kernel->name; kernel++)
        if ((!name || !strcmp(kernel->name, name)) && kernel->is_supported())
            return kernel;
    PyErr_Format(PyExc_LookupError, "this processor has no kernel %s", name ? name : "at all");
    return NULL;
}

typedef struct {
    int64_t source; /* number of the source */
    int64_t begin;  /* offset of the first byte in it */
    int64_t at;     /* offset of its copy, in the image */
    int64_t num_bytes;
} Row;

/* Copy rows of a table, each with its CRC-32. Return the number of the first one that does not fit, or `last`. */
static Py_ssize_t run_rows(const Kernel *kernel, const Py_buffer *target, Py_ssize_t shift, const Py_buffer *sources,
                           const Row *rows, Py_ssize_t first, Py_ssize_t last, int64_t *crcs)
{
    const uintptr_t *addresses = sources->buf;
    const int64_t num_sources = (int64_t)(sources->len / (Py_ssize_t)sizeof *addresses);
    const uintptr_t low = (uintptr_t)target->buf, high = low + (uintptr_t)target->len;
    for (Py_ssize_t number = first; number < last; number++) {
        if (number + ROWS_AHEAD < last) { /* small sources lie anywhere in memory */
            const Row *later = rows + number + ROWS_AHEAD;
            if (later->source >= 0 && later->source < num_sources)
                __builtin_prefetch((const void *)(addresses[later->source] + (uintptr_t)later->begin));
        }
        const Row *row = rows + number;
        const int64_t at = row->at - shift;
        if (row->source < 0 || row->source >= num_sources || row->begin < 0 || row->num_bytes < 0 || at < 0 ||
            at > target->len || row->num_bytes > target->len - at)
            return number;
        const uintptr_t from = addresses[row->source] + (uintptr_t)row->begin;
        if (from < high && from + (uintptr_t)row->num_bytes > low)
            return number;
        crcs[number] = run(kernel, (uint8_t *)target->buf + at, (const uint8_t *)from, (size_t)row->num_bytes, 0);
    }
    return last;
}

/* The caller knows that the sources have the rows' bytes. */
static PyObject *copy_rows(PyObject *module, PyObject *arguments)
{
    PyObject *objects[4];
    Py_buffer views[4]; /* target, sources, rows, crcs */
    Py_ssize_t shift, first, last, num_views = 0, until = -1;
    const char *name = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OnOOnnO|z:copy_rows", &objects[0], &shift, &objects[1], &objects[2], &first,
                          &last, &objects[3], &name))
        return NULL;
    const Kernel *kernel = kernel_named(name);
    if (!kernel)
        return NULL;
    for (; num_views < 4; num_views++)
        if (PyObject_GetBuffer(objects[num_views], &views[num_views], num_views % 3 ? PyBUF_SIMPLE : PyBUF_WRITABLE))
            goto end;
    if (first < 0 || last < first || last > views[2].len / (Py_ssize_t)sizeof(Row) ||
        last > views[3].len / (Py_ssize_t)sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "there are not as many rows");
        goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    until = run_rows(kernel, &views[0], shift, &views[1], views[2].buf, first, last, views[3].buf);
    Py_END_ALLOW_THREADS
    if (until < last)
        PyErr_Format(PyExc_ValueError, "row %zd does not fit, or overlaps the target", until);
end:
    while (num_views--)
        PyBuffer_Release(&views[num_views]);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *check(PyObject *module, PyObject *arguments)
{
    PyObject *data;
    Py_buffer view;
    unsigned long before = 0;
    const char *name = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "O|kz:check", &data, &before, &name))
        return NULL;
    const Kernel *kernel = kernel_named(name);
    if (!kernel || PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    uint32_t crc;
    if (view.len < LEAST_UNLOCKED) {
        crc = run(kernel, NULL, view.buf, (size_t)view.len, (uint32_t)before);
    } else {
        Py_BEGIN_ALLOW_THREADS
        crc = run(kernel, NULL, view.buf, (size_t)view.len, (uint32_t)before);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLong(crc);
}

static int set_up(PyObject *module)
{
    PyObject *names = PyList_New(0);
    if (!names)
        return -1;
    fill_tables();
    for (Kernel *kernel = all_kernels; kernel->name; kernel++) {
        const size_t num_bits = 8 * 4 * kernel->vector_bytes; /* of a block */
        kernel->factors[0] = power_of_x(num_bits + 32);
        kernel->factors[1] = power_of_x(num_bits - 32);
        if (!kernel->is_supported())
            continue;
        PyObject *name = PyUnicode_FromString(kernel->name);
        const int failed = !name || PyList_Append(names, name) < 0;
        Py_XDECREF(name);
        if (failed) {
            Py_DECREF(names);
            return -1;
        }
    }
    PyObject *fixed = PyList_AsTuple(names);
    Py_DECREF(names);
    const int failed = !fixed || PyModule_AddObjectRef(module, "KERNELS", fixed) < 0;
    Py_XDECREF(fixed);
    return failed ? -1 : 0;
}

static PyMethodDef functions[] = {
    { "copy_rows", copy_rows, METH_VARARGS,
      "copy_rows(target, shift, sources, rows, first, last, crcs, kernel=None)\n--\n\n"
      "Copy rows of a table into a buffer, and store the CRC-32 of each." },
    { "check", check, METH_VARARGS,
      "check(data, before=0, kernel=None)\n--\n\nReturn the CRC-32 of a contiguous buffer." },
    { NULL, NULL, 0, NULL },
};

static PyModuleDef_Slot slots[] = {
    { Py_mod_exec, (void *)set_up },
    { 0, NULL },
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "copy_crc",
    .m_doc = "CRC-32 of bytes, alone or as they are copied. KERNELS: those of this machine, the fastest first.",
    .m_size = 0,
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit_copy_crc(void)
{
    return PyModuleDef_Init(&definition);
}
