// A CUDA runtime without a GPU, preloaded before libcudart (LD_PRELOAD): one device, memory of the host, streams and
// events that are always done. Kernels cannot be launched: an operation that was not intercepted in Python fails here.
#include <cuda_runtime_api.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#define OK              \
  {                     \
    return cudaSuccess; \
  }
static std::map<char*, size_t> pinned;
static std::mutex lock;
static cudaError_t last = cudaSuccess;
static cudaError_t refuse() {
  fputs("fake CUDA: an operation was not intercepted: kernel launch refused\n", stderr);
  return last = cudaErrorNoKernelImageForDevice;
}
static int done() { return 0; }
extern "C" {
// The driver's own functions that torch looks up by name.
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* r) {
  *f = (void*)done;
  if (r) *r = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) OK cudaError_t cudaDriverGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "fake device");
  {
    const char* c = getenv("FAKE_CUDA_CAPABILITY");
    p->major = c ? c[0] - 48 : 9;
    p->minor = c ? c[2] - 48 : 0;
  }
  p->totalGlobalMem = 1ull << 36;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr, int) {
  *v = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
  *a = 0;
  *b = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* a, int, int) {
  *a = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() OK cudaError_t cudaMalloc(void** p, size_t n) {
  *p = malloc(n ? n : 1);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  free(p);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  *p = malloc(n ? n : 1);
  std::lock_guard<std::mutex> l(lock);
  pinned[(char*)*p] = n;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  std::lock_guard<std::mutex> l(lock);
  pinned.erase((char*)p);
  free(p);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* a, size_t* b) {
  *a = *b = 1ull << 36;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* q) {
  std::lock_guard<std::mutex> l(lock);
  auto i = pinned.upper_bound((char*)q);
  bool in = i != pinned.begin() && (--i, (char*)q < i->first + i->second);
  memset(a, 0, sizeof *a);
  a->type = in ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}
static char handle;
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  *s = (cudaStream_t)&handle;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) OK cudaError_t cudaStreamSynchronize(cudaStream_t) OK cudaError_t
    cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) OK cudaError_t
    cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  *s = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* n) {
  *s = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (n) *n = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) OK cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = (cudaEvent_t)&handle;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = (cudaEvent_t)&handle;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) OK cudaError_t cudaEventQuery(cudaEvent_t) OK cudaError_t
    cudaEventRecord(cudaEvent_t, cudaStream_t) OK cudaError_t
    cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) OK cudaError_t
    cudaEventSynchronize(cudaEvent_t) OK cudaError_t cudaEventElapsedTime(float* t, cudaEvent_t, cudaEvent_t) {
  *t = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  cudaError_t e = last;
  last = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return refuse(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return refuse(); }
cudaError_t cudaMemcpyAsync(void* a, const void* b, size_t n, cudaMemcpyKind, cudaStream_t) {
  memcpy(a, b, n);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* a, const void* b, size_t n, cudaMemcpyKind) {
  memcpy(a, b, n);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* a, int v, size_t n, cudaStream_t) {
  memset(a, v, n);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* a, int v, size_t n) {
  memset(a, v, n);
  return cudaSuccess;
}
}
