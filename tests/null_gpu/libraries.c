/* cuBLAS and NCCL for GPUs that compute nothing: handles, and no work. */
#include <string.h>

static long handles = 4096;

static int handle(void **made) {
  *made = (void *)(handles += 16);
  return 0;
}

int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }

int cublasCreate_v2(void **made) { return handle(made); }
int cublasGetVersion_v2(void *of, int *version) { *version = 130100; return 0; }
int cublasGetMathMode(void *of, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *of, int *mode) { *mode = 0; return 0; }
const char *cublasGetStatusString(int status) { return "none"; }

int cublasLtCreate(void **made) { return handle(made); }
unsigned long cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulDescCreate(void **made) { return handle(made); }
int cublasLtMatrixLayoutCreate(void **made) { return handle(made); }
int cublasLtMatmulPreferenceCreate(void **made) { return handle(made); }
int cublasLtMatmulAlgoGetHeuristic(
    void *of, void *product, void *a, void *b, void *c, void *d, void *preference, int asked,
    void *results, int *found) {
  *found = 1;
  return 0;
}
const char *cublasLtGetStatusString(int status) { return "none"; }

int ncclGetVersion(int *version) { *version = 23007; return 0; }
int ncclGetUniqueId(void *id) { memset(id, 7, 128); return 0; }
int ncclCommInitRank(void **made) { return handle(made); }
int ncclCommInitRankConfig(void **made) { return handle(made); }
int ncclCommInitRankScalable(void **made) { return handle(made); }
int ncclCommSplit(void *of, int color, int key, void **made) { return handle(made); }
int ncclCommGetAsyncError(void *of, int *error) { *error = 0; return 0; }
int ncclMemAlloc(void **at, unsigned long size) { return 1; }
const char *ncclGetErrorString(int error) { return "none"; }
const char *ncclGetLastError(void *of) { return "none"; }
