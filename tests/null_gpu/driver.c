/* libcuda.so.1 of GPUs that compute nothing: what Triton asks it. Its other calls do nothing. */

int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "none"; return 0; }
int cuGetProcAddress_v2(const char *name, void **call, int version, long flags, int *status) {
  *call = (void *)cuInit;
  return 0;
}

int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetCount(int *count) { *count = 4; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  switch (which) { /* CUdevice_attribute; values of an H100 */
    case 1: *value = 1024; break;    /* threads of a block */
    case 10: *value = 32; break;     /* of a warp */
    case 16: *value = 132; break;    /* multiprocessors */
    case 75: *value = 9; break;      /* compute capability, major */
    case 76: *value = 0; break;      /* and minor */
    case 81: *value = 233472; break; /* shared bytes of a multiprocessor */
    case 82: *value = 65536; break;  /* registers of a multiprocessor */
    case 97: *value = 232448; break; /* shared bytes of a block, at most */
    default: *value = 1;
  }
  return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)16; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)16; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(unsigned long *value, int which) { *value = 0; return 0; }

int cuModuleLoad(void **module, const char *path) { *module = (void *)32; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)32; return 0; }
int cuModuleGetFunction(void **kernel, void *module, const char *name) {
  *kernel = (void *)48;
  return 0;
}
int cuFuncGetAttribute(int *value, int which, void *kernel) {
  *value = which == 0 ? 1024 : which == 4 ? 64 : 0; /* threads of a block, registers; else none */
  return 0;
}
int cuOccupancyMaxActiveClusters(int *count) { *count = 16; return 0; }
int cuPointerGetAttribute(void *value, int which, unsigned long at) {
  *(unsigned long *)value = at;
  return 0;
}
