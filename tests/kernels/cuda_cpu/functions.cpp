// The emulated kernels for Python's ctypes: addresses by name, the seed of the schedule, faults.
#include "cuda_cpu.h"
#include "kernels.h"
#include "product_cuda.cuh"

extern "C" void* crate_function(const char* name) {
  using namespace crate_mini;
  static const std::map<std::string, void*> table = {
#define ENTRY(f) {#f, reinterpret_cast<void*>(f)}
#define WITH_WORKSPACE(f) ENTRY(f##_cuda), ENTRY(f##_workspace_cuda)
      WITH_WORKSPACE(ista_forward), WITH_WORKSPACE(ista_backward), WITH_WORKSPACE(ista_decode),
      WITH_WORKSPACE(mssa_project_forward), WITH_WORKSPACE(mssa_project_backward)};
  return table.at(name);
}

extern "C" void crate_seed(unsigned seed) { emu::random.seed(seed); }

extern "C" void crate_plant(int fault) { emu::planted = fault; }

extern "C" const char* crate_fault() {  // what went wrong since the last call, or an empty string
  static std::string last;
  last.swap(emu::message);
  emu::message.clear();
  return last.c_str();
}

extern "C" void crate_device(int major, int multiprocessors) {
  emu::major = major;
  emu::multiprocessors = multiprocessors;
}

extern "C" int crate_splits(int64_t M, int64_t N, int64_t K, int multiprocessors) {
  return crate_mini::choose_splits(M, N, K, multiprocessors, 512);  // as the module that ships
}

extern "C" const char* crate_problem(int error) {
  static std::string text;
  text = crate_mini::cuda_problem(error);
  return text.c_str();
}
