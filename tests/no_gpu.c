/* A CUDA driver without a GPU: it accepts everything, and keeps the arguments of the last launch. */
#include <stdint.h>
#include <string.h>

#define ACCEPTS(name) int name(void) { return 0; }
ACCEPTS(cuCtxSetCurrent) ACCEPTS(cuCtxSetLimit) ACCEPTS(cuFuncSetAttribute) ACCEPTS(cuFuncSetCacheConfig)
ACCEPTS(cuModuleUnload) ACCEPTS(cuOccupancyMaxActiveClusters) ACCEPTS(cuPointerGetAttributes)
ACCEPTS(cuTensorMapEncodeTiled) ACCEPTS(cuTensorMapEncodeIm2col) ACCEPTS(cuInit)

#define ANSWERS(name, type, value) int name(type *out) { *out = (type)(value); return 0; }
ANSWERS(cuCtxGetCurrent, uintptr_t, 1) ANSWERS(cuCtxGetDevice, int, 0) ANSWERS(cuCtxGetLimit, size_t, 1)
ANSWERS(cuDeviceGet, int, 0) ANSWERS(cuDeviceGetCount, int, 1) ANSWERS(cuDevicePrimaryCtxRetain, uintptr_t, 1)
ANSWERS(cuDriverGetVersion, int, 13000) ANSWERS(cuGetErrorString, const char *, "an error")
ANSWERS(cuModuleLoadData, uintptr_t, 1)

/* Each kernel has a number. */
int cuModuleGetFunction(uintptr_t *out) { static uintptr_t count; *out = ++count; return 0; }

/* Any attribute of a device is large. Of a kernel, only the number of threads that it can have is. */
ANSWERS(cuDeviceGetAttribute, int, 232448)
int cuFuncGetAttribute(int *out, int attribute, void *function) { *out = attribute ? 0 : 1024; return 0; }
int cuPointerGetAttribute(uint64_t *out, int attribute, uint64_t pointer) { *out = pointer; return 0; }

struct config { unsigned grid[3], block[3], shared; void *stream, *kernel; };
struct config last;
int launches, wanted;
uint64_t arguments[32];

/* Triton 3.3 and older call this one. */
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned one, unsigned also_one,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    last = (struct config){{x, y, z}, {threads, one, also_one}, shared, stream, function};
    launches++;
    for (int i = 0; i < wanted; i++) memcpy(&arguments[i], parameters[i], 8);
    return 0;
}

int cuLaunchKernelEx(const struct config *config, void *function, void **parameters, void **extra) {
    const unsigned *grid = config->grid, *block = config->block;
    return cuLaunchKernel(function, grid[0], grid[1], grid[2], block[0], block[1], block[2], config->shared,
                          config->stream, parameters, extra);
}
