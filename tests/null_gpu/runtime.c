/* The CUDA runtime of four GPUs that compute nothing: memory is the host's, work is done at once,
 * no kernel runs. It stands before the true one (LD_PRELOAD), which does the rest. */
#include <stdlib.h>
#include <string.h>

#include "cuda_runtime_api.h"

#define DONE { return cudaSuccess; }
#define GIBI (1ULL << 30)
enum { DEVICES = 4, VERSION = 13000 };

static __thread int current;
static long handles = 4096; /* of streams and events; nobody follows them */

static void *handle(void) { return (void *)(handles += 16); }

static int hidden(void) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  return visible && !*visible;
}

static cudaError_t memory(void **at, size_t size) {
  size = size ? size : 1;
  if (posix_memalign(at, 512, size)) return cudaErrorMemoryAllocation;
  memset(*at, 0, size); /* numbers that nobody computed are zeros */
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) { *version = VERSION; DONE }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = VERSION; DONE }
cudaError_t cudaGetLastError(void) DONE
cudaError_t cudaPeekAtLastError(void) DONE

cudaError_t cudaGetDeviceCount(int *count) {
  *count = hidden() ? 0 : DEVICES;
  return hidden() ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) { *device = current; DONE }
cudaError_t cudaSetDevice(int device) { current = device; DONE }
cudaError_t cudaDeviceSynchronize(void) DONE
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; DONE }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; DONE }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) { *pool = handle(); DONE }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  strncpy(id, "0000:01:00.0", size);
  DONE
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    default: *value = 1;
  }
  DONE
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "NVIDIA H100 80GB HBM3");
  found->totalGlobalMem = 80 * GIBI;
  found->major = 9;
  found->multiProcessorCount = 132;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = 232448;
  found->sharedMemPerMultiprocessor = 233472;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->l2CacheSize = 50 << 20;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  DONE
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *all) { *free = 79 * GIBI; *all = 80 * GIBI; DONE }
cudaError_t cudaMalloc(void **at, size_t size) { return memory(at, size); }
cudaError_t cudaHostAlloc(void **at, size_t size, unsigned flags) { return memory(at, size); }
cudaError_t cudaFree(void *at) { free(at); DONE }
cudaError_t cudaFreeHost(void *at) { free(at); DONE }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  memmove(to, from, size);
  DONE
}
cudaError_t cudaMemcpyAsync(
    void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  memmove(to, from, size);
  DONE
}
cudaError_t cudaMemset(void *at, int value, size_t size) { memset(at, value, size); DONE }
cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t stream) {
  memset(at, value, size);
  DONE
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *at) {
  memset(found, 0, sizeof *found);
  DONE
}
cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) { *at = (void *)symbol; DONE }

cudaError_t cudaStreamCreate(cudaStream_t *made) { *made = handle(); DONE }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *made, unsigned flags) { *made = handle(); DONE }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *made, unsigned flags, int priority) {
  *made = handle();
  DONE
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; DONE }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  DONE
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
    size_t *count) {
  *status = cudaStreamCaptureStatusNone;
  DONE
}
cudaError_t cudaEventCreate(cudaEvent_t *made) { *made = handle(); DONE }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *made, unsigned flags) { *made = handle(); DONE }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { *ms = 1; DONE }

/* Kernels: found, of an H100, and not run. */
cudaError_t cudaLaunchKernel(
    const void *kernel, dim3 grid, dim3 block, void **given, size_t shared, cudaStream_t stream) DONE
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute which, int value) DONE
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  DONE
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int size, size_t shared, unsigned flags) {
  *blocks = 2;
  DONE
}

/* The driver's calls that torch asks the runtime for. */
static int is_active(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **call, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
  *call = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)nothing : (void *)is_active;
  if (result) *result = cudaDriverEntryPointSuccess;
  DONE
}
