// kernels.h for Python: pointers are integers (Tensor.data_ptr()), None stands for null.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <type_traits>

#include "kernels.h"

#ifndef CRATE_STAMP  // setup.py defines all three
#define CRATE_STAMP ""
#define CRATE_COMPILERS ""
#define CRATE_ARCHS ""
#endif

namespace py = pybind11;
using namespace crate_mini;

// A kernel as Python calls it: each pointer an int or None. It runs without the interpreter lock.
template <class A>
using FromPython = std::conditional_t<std::is_pointer_v<A>, std::optional<uintptr_t>, A>;
template <class A> A convert(FromPython<A> value) {
  if constexpr (std::is_pointer_v<A>)
    return reinterpret_cast<A>(value.value_or(0));
  else
    return value;
}
template <class R, class... A> auto kernel(R (*f)(A...)) {
  return [f](FromPython<A>... arguments) {
    py::gil_scoped_release free;
    return f(convert<A>(arguments)...);
  };
}

static py::dict build_info() {
  py::dict info;
  info["stamp"] = CRATE_STAMP;
  info["compilers"] = CRATE_COMPILERS;
  info["archs"] = CRATE_ARCHS;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef CRATE_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

PYBIND11_MODULE(_C, m) {
#define KERNEL(name) m.def(#name, kernel(&name))
  KERNEL(ista_naive_forward);
  KERNEL(ista_naive_backward);
  KERNEL(ista_forward_cpu);
  KERNEL(ista_backward_cpu);
  KERNEL(ista_decode_cpu);
  KERNEL(mssa_project_forward_cpu);
  KERNEL(mssa_project_backward_cpu);
  KERNEL(attention_forward_cpu);
  KERNEL(attention_backward_cpu);
  KERNEL(head_cpu);
  KERNEL(top_k_cpu);
#ifdef CRATE_CUDA
#define WITH_WORKSPACE(name) \
  KERNEL(name##_cuda);       \
  KERNEL(name##_workspace_cuda)
  WITH_WORKSPACE(ista_forward);
  WITH_WORKSPACE(ista_backward);
  WITH_WORKSPACE(ista_decode);
  WITH_WORKSPACE(mssa_project_forward);
  WITH_WORKSPACE(mssa_project_backward);
  m.def("cuda_problem", &cuda_problem);
#endif
  m.def("build_info", &build_info);
  m.def("isa_names", &isa_names);
  m.def("isa_name", &isa_name);
  m.def("use_isa", [](const std::string& name) { return use_isa(name.c_str()); });
}
