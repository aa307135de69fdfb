// The emulated kernels for Python's ctypes: addresses by name, the seed of the schedule, faults.
#include "cuda_cpu.h"
#include "kernels.h"

extern "C" void* crate_function(const char* name) {
  using namespace crate_mini;
  static const std::map<std::string, void*> table = {
#define ENTRY(f) {#f, reinterpret_cast<void*>(f)}
      ENTRY(ista_forward_cuda),         ENTRY(ista_backward_cuda),
      ENTRY(ista_decode_cuda),          ENTRY(ista_workspace_cuda),
      ENTRY(mssa_project_forward_cuda), ENTRY(mssa_project_backward_cuda),
      ENTRY(mssa_workspace_cuda)};
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
