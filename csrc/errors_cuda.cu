// CUDA's error codes in words, with what helps against those that a build or a driver causes.
#include "cuda_common.cuh"
#include "kernels.h"

namespace crate_mini {
namespace {

// 13.0 for 13000.
std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

std::string cuda_problem(int error) {
  std::string text = cudaGetErrorString(static_cast<cudaError_t>(error));
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion)
    text += "; the driver knows CUDA " + version(driver) + " and our kernels were built with " +
            version(runtime) + ": update the driver, or build with an older nvcc (CUDA_HOME)";
  if (error == cudaErrorNoKernelImageForDevice)
    text += "; our kernels were not built for this GPU: CRATE_CUDA_ARCHS=75 pip install -e . "
            "builds them for a T4, 80 for an A100, 90a for an H100, 120 for an RTX 5090";
  return text;
}

}  // namespace crate_mini
