/* Gram matrices of wide float32 features on a CPU, for which BLAS has no routine.
 *
 * A matrix product packs both of its operands, makes both halves of a symmetric matrix, and accumulates in float32.
 * Here a block of features of all samples is packed once, minus a common vector. Only tiles on and below the diagonal
 * are made, and blocks are added in float64. Memory is read once, and buffers do not grow with the number of features.
 *
 * It is built if there is a C compiler with OpenMP and GCC's vector types, and used on processors with AVX2. See
 * native.py for the callers and reference.py for what runs elsewhere.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Features in a block: its sums are float32, sums over blocks float64. A multiple of every vector width below. */
#define BLOCK 1024
/* Distance between rows of a packed block. Powers of two would all map to the same few cache lines. */
#define STRIDE (BLOCK + 16)
/* With more samples than this, blocks have half as many features, so that the second-level cache holds one. */
#define MANY_SAMPLES 256
/* Multiplications that are worth all threads. Never use only some: the threads are PyTorch's own, and a smaller team
 * would end those that it does not need. */
#define WORTH_THREADS (1 << 21)

/* The features of m groups of n samples: (m * n, positions, channels) with these strides, in floats. */
typedef struct {
    const float *data;
    ptrdiff_t groups, samples, positions, channels;
    ptrdiff_t sample_stride, position_stride, channel_stride;
} Features;

/* Buffers of one thread. They are kept from call to call, because fresh memory would cost more than filling it. */
typedef struct {
    float *panel, *common;
    double *sums, *edge;
    size_t size;
} Buffers;

static pthread_key_t buffers_key;

static void *aligned(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

static void free_buffers(void *buffers) {
    Buffers *own = buffers;
    free(own->panel), free(own->common), free(own->sums), free(own->edge), free(own);
}

/* Buffers for panels of `rows` rows, NULL when memory runs out. */
static Buffers *take_buffers(ptrdiff_t rows) {
    Buffers *own = pthread_getspecific(buffers_key);
    if (!own && (own = calloc(1, sizeof *own)))
        pthread_setspecific(buffers_key, own);
    if (!own)
        return NULL;
    if (own->size < (size_t)rows) {
        free(own->panel), free(own->common), free(own->sums), free(own->edge);
        own->panel = aligned(rows * STRIDE * sizeof(float));
        own->common = aligned(BLOCK * sizeof(float));
        own->sums = aligned(rows * rows * sizeof(double));
        own->edge = aligned(rows * rows * sizeof(double));
        own->size = own->panel && own->common && own->sums && own->edge ? rows : 0;
    }
    return own->size ? own : NULL;
}

/* Floats of a row of `width` features that products run over: up to a multiple of every vector width. */
static inline ptrdiff_t padded(ptrdiff_t width) { return (width + 15) / 16 * 16; }

/* The features [start, start + width) of a group, less a common vector, to the rows of the panel with zeros behind them.
 *
 * The common vector is the elementwise median of three samples: near the mean, and one outlier does not move it.
 * Returns its squared norm. Inlined into each variant below, and so compiled for its instructions.
 */
static inline __attribute__((always_inline)) double pack(const Features *x, const float *group, ptrdiff_t start,
                                                         ptrdiff_t width, const Buffers *own) {
    const ptrdiff_t n = x->samples, step = x->channel_stride;
    float *restrict common = own->common;
    double norm = 0;
    ptrdiff_t done = 0;
    while (done < width) {
        const ptrdiff_t position = (start + done) / x->channels, channel = (start + done) % x->channels;
        const ptrdiff_t left = x->channels - channel, run = left < width - done ? left : width - done;
        const float *from = group + position * x->position_stride + channel * step;
        const float *first = from, *middle = from + n / 2 * x->sample_stride, *last = from + (n - 1) * x->sample_stride;
        double squares = 0;
        for (ptrdiff_t k = 0; k < run; k++) {
            const float a = first[k * step], b = middle[k * step], c = last[k * step];
            const float low = a < b ? a : b, high = a < b ? b : a, most = high < c ? high : c;
            common[done + k] = low > most ? low : most;
        }
#pragma omp simd reduction(+ : squares)
        for (ptrdiff_t k = 0; k < run; k++)
            squares += (double)common[done + k] * common[done + k];
        norm += squares;
        for (ptrdiff_t i = 0; i < n; i++) {
            const float *row = from + i * x->sample_stride;
            float *restrict to = own->panel + i * STRIDE + done;
            if (step == 1)
                for (ptrdiff_t k = 0; k < run; k++)
                    to[k] = row[k] - common[done + k];
            else
                for (ptrdiff_t k = 0; k < run; k++)
                    to[k] = row[k * step] - common[done + k];
        }
        done += run;
    }
    for (ptrdiff_t i = 0; i < n; i++)
        memset(own->panel + i * STRIDE + width, 0, (padded(width) - width) * sizeof(float));
    return norm;
}

#define VARIANT avx512
#define TARGET "avx512f,avx512vl,avx512dq,avx512bw,fma"
#define LANES 16
#define TALL 4
#include "_native_tiles.h"

#define VARIANT avx2
#define TARGET "avx2,fma"
#define LANES 8
#define TALL 3
#include "_native_tiles.h"

/* `tile`: a number of rows has to be a multiple of it. */
typedef struct {
    const char *name;
    ptrdiff_t tile;
    double (*add_block)(const Features *, const float *, ptrdiff_t, ptrdiff_t, ptrdiff_t, const Buffers *);
} Variant;

static const Variant variants[] = {{"avx512", 4, add_block_avx512}, {"avx2", 12, add_block_avx2}};

static int runs_here(int variant) {
    __builtin_cpu_init();
    return variant == 0 ? __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")
                        : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

/* What choose.py needs to know about each Gram matrix: `_measured` there, and the norm of the subtracted vector. */
enum { SPREAD, SIZE, WHOLE, OWN, ROWS, TOTAL, TRACE, SHIFT, MEASURES };

/* The same for one (n, n) Gram matrix of samples from which a vector of squared norm `norm` was subtracted. */
static void measure(const double *values, ptrdiff_t n, double norm, double *found) {
    double whole = 0, own = 0, rows = 0, total = 0, trace = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        const double diagonal = values[i * n + i];
        double row = 0, squares = 0;
#pragma omp simd reduction(+ : row, squares)
        for (ptrdiff_t j = 0; j < n; j++) {
            row += values[i * n + j];
            squares += values[i * n + j] * values[i * n + j];
        }
        trace += diagonal;
        total += row;
        whole += squares;
        own += diagonal * diagonal;
        rows += (row - diagonal) * (row - diagonal);
    }
    found[SPREAD] = trace - total / n;
    found[SIZE] = trace + n * norm;
    found[WHOLE] = whole, found[OWN] = own, found[ROWS] = rows, found[TOTAL] = total, found[TRACE] = trace;
    found[SHIFT] = sqrt(norm);
}

/* Row i of the lower triangle of rows x rows, added to that of n x n. */
static void add_row(const double *sums, ptrdiff_t rows, double *out, ptrdiff_t n, ptrdiff_t i) {
    for (ptrdiff_t j = 0; j <= i; j++)
        out[i * n + j] += sums[i * rows + j];
}

/* The upper triangle of n x n from the lower one, a cache line's worth of columns at a time. */
static void mirror(double *out, ptrdiff_t n) {
    for (ptrdiff_t low = 0; low < n; low += 8)
        for (ptrdiff_t j = 0; j < n; j++)
            for (ptrdiff_t i = low > j ? low : j + 1; i < low + 8 && i < n; i++)
                out[j * n + i] = out[i * n + j];
}

/* One thread's part of a group that it shares with others: `sums` (rows, rows), NULL if there is none. */
typedef struct {
    ptrdiff_t group;
    double norm;
    const double *sums;
} Edge;

/* The Gram matrices of all groups to (m, n, n) `out`, zeros before, and what they measure to (m, MEASURES) `measures`.
 *
 * Every thread takes a run of blocks. A group that lies in one thread's run goes to `out` from there; at the ends of a
 * run, where groups are shared, sums are put aside and added in the order of threads, so that results repeat to the bit:
 * those of the first group of a run in `edge`, those of the last stay in `sums`.
 * Returns 0 when memory ran out.
 */
static int grams(const Features *x, const Variant *variant, int threads, double *out, double *measures) {
    const ptrdiff_t n = x->samples, rows = (n + variant->tile - 1) / variant->tile * variant->tile;
    const ptrdiff_t features = x->positions * x->channels;
    if ((double)x->groups * n * n * features / 2 < WORTH_THREADS)
        threads = 1;
    // Smaller blocks where else there were none for some threads.
    ptrdiff_t block = n > MANY_SAMPLES ? BLOCK / 2 : BLOCK;
    while (block > 64 && x->groups * ((features + block - 1) / block) < threads)
        block /= 2;
    const ptrdiff_t blocks = (features + block - 1) / block, items = x->groups * blocks;
    // Groups at the ends of a thread's run that it shares with others, two for each thread.
    Edge *edges = calloc(2 * threads, sizeof *edges);
    if (!edges)
        return 0;
    // Squared norms, until `measure` takes their roots in place.
    double *norms = measures + SHIFT;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const ptrdiff_t team = omp_get_num_threads(), self = omp_get_thread_num();
        const ptrdiff_t from = items * self / team, to = items * (self + 1) / team;
        Buffers *own = take_buffers(rows);
        Edge *shared = edges + 2 * self;
        if (!own) {
#pragma omp atomic write
            failed = 1;
        } else {
            // Rows that fill up the last tiles.
            memset(own->panel + n * STRIDE, 0, (rows - n) * STRIDE * sizeof(float));
            for (ptrdiff_t item = from; item < to;) {
                const ptrdiff_t group = item / blocks, end = (group + 1) * blocks < to ? (group + 1) * blocks : to;
                const int is_shared = item % blocks != 0 || end != (group + 1) * blocks;
                const float *data = x->data + group * n * x->sample_stride;
                double norm = 0;
                memset(own->sums, 0, rows * rows * sizeof(double));
                for (; item < end; item++) {
                    const ptrdiff_t start = item % blocks * block, left = features - start;
                    norm += variant->add_block(x, data, start, left < block ? left : block, rows, own);
                }
                if (is_shared) {
                    const double *sums = own->sums;
                    if (item < to)
                        sums = memcpy(own->edge, own->sums, rows * rows * sizeof(double));
                    *shared++ = (Edge){group, norm, sums};
                } else {
                    for (ptrdiff_t i = 0; i < n; i++)
                        add_row(own->sums, rows, out + group * n * n, n, i);
                    norms[group * MEASURES] = norm;
                }
            }
        }
#pragma omp barrier
#pragma omp for
        for (ptrdiff_t i = 0; i < n; i++)
            for (const Edge *edge = edges; edge < edges + 2 * team; edge++)
                if (edge->sums)
                    add_row(edge->sums, rows, out + edge->group * n * n, n, i);
#pragma omp single
        for (const Edge *edge = edges; edge < edges + 2 * team; edge++)
            if (edge->sums)
                norms[edge->group * MEASURES] += edge->norm;
#pragma omp for
        for (ptrdiff_t group = 0; group < x->groups; group++) {
            mirror(out + group * n * n, n);
            measure(out + group * n * n, n, norms[group * MEASURES], measures + group * MEASURES);
        }
    }
    free(edges);
    return !failed;
}

static PyObject *py_grams(PyObject *self, PyObject *args) {
    Py_ssize_t data, out, measures;
    Features x;
    int threads, variant;
    if (!PyArg_ParseTuple(args, "nnnnnnnnnnii", &data, &x.groups, &x.samples, &x.positions, &x.channels,
                          &x.sample_stride, &x.position_stride, &x.channel_stride, &out, &measures, &threads, &variant))
        return NULL;
    x.data = (const float *)data;
    int done;
    Py_BEGIN_ALLOW_THREADS
    done = grams(&x, &variants[variant], threads, (double *)out, (double *)measures);
    Py_END_ALLOW_THREADS
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_variants(PyObject *self, PyObject *args) {
    PyObject *found = PyList_New(0);
    for (int i = 0; found && i < (int)(sizeof(variants) / sizeof(*variants)); i++)
        if (runs_here(i)) {
            PyObject *entry = Py_BuildValue("(si)", variants[i].name, i);
            if (!entry || PyList_Append(found, entry) < 0)
                Py_CLEAR(found);
            Py_XDECREF(entry);
        }
    return found;
}

static PyMethodDef methods[] = {
    {"grams", py_grams, METH_VARARGS,
     "grams(data, m, n, P, C, sample_stride, position_stride, channel_stride, out, measures, threads, variant)"},
    {"variants", py_variants, METH_NOARGS, "Names and numbers of the variants that this processor can run, best first."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) {
    static int has_key;
    if (!has_key && pthread_key_create(&buffers_key, free_buffers) != 0)
        return PyErr_NoMemory();
    has_key = 1;
    return PyModuleDef_Init(&module);
}
