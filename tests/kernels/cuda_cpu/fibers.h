// The machine under cuda_cpu.h: blocks of CUDA threads, run one after another on a CPU.
//
// Every CUDA thread is a fiber. Between two barriers or warp operations the threads of a block run
// one after another in an order drawn from a seed, and whole warps are held back at random; blocks
// come in random order too. Shared memory is exactly as long as the launch asked for and starts as
// 0xFF bytes (NaN in every float format). An asynchronous copy lands at once or only when it is
// waited for, by a coin flip.
//
// What a GPU would punish is reported as an error of the launch: a thread that leaves before a
// barrier at which others wait, lanes of a warp in different operations, misaligned 16-byte
// accesses, copies that are never waited for, launch limits, rows that ldmatrix would have to read
// one after another because they share banks. Not modelled: the memory order of a real GPU between
// two barriers, and speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
typedef void* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };

namespace emu {
enum State {
  kReady,
  kWarp,
  kBlock,
  kDone
};  // kWarp, kBlock: waiting for the warp or the whole block
struct Copy {
  void* to;
  const void* from;
  int bytes;
  int group;
};
// What a lane shows to its warp in one operation.
struct Lane {
  unsigned char bytes[32];
};
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false;
  State state = kDone;
  dim3 index;
  int number = 0, operation = 0, turn = 0, group = 0;
  std::vector<Copy> copies;
};

constexpr size_t kStack = 256 << 10, kSharedDefault = 48 << 10, kSharedLimit = 227 << 10;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<std::vector<Lane>> slots[2];  // [turn & 1][warp][lane]
inline std::function<void()> body;
inline Fiber* current;
inline ucontext_t scheduler;
inline jmp_buf scheduler_resume;
inline dim3 block_index, block_size, grid_size;
inline unsigned char* shared_memory;
inline std::map<const void*, size_t> shared_allowed;
inline std::mt19937 random(0);
inline std::string message;
inline int error = cudaSuccess;
inline int major = 9, multiprocessors = 4;  // small, so that tests reach every path
inline int planted = 0;  // number of the planted fault that is awake

inline void fault(const std::string& what) {
  if (message.empty()) message = what;
  error = cudaErrorLaunchFailure;
}

// swapcontext is a system call; setjmp is not, and 20 times faster. ASan understands only the
// former.
#ifdef __SANITIZE_ADDRESS__
inline void yield() { swapcontext(&current->context, &scheduler); }
inline void enter(Fiber* f) { swapcontext(&scheduler, &f->context); }
#else
inline void yield() {
  if (!_setjmp(current->resume)) _longjmp(scheduler_resume, 1);
}
inline void enter(Fiber* f) {
  if (_setjmp(scheduler_resume)) return;
  if (f->started) _longjmp(f->resume, 1);
  f->started = true;
  setcontext(&f->context);
}
#endif

inline void fiber_main() {
  for (;;) {  // one iteration is the life of one CUDA thread; the next block reuses the fiber
    body();
    if (!current->copies.empty()) fault("a thread ended with asynchronous copies in flight");
    current->state = kDone;
    yield();
  }
}

inline Fiber* new_fiber() {
  Fiber* f = new Fiber;
  f->stack.reset(new char[kStack]);
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack.get();
  f->context.uc_stack.ss_size = kStack;
  f->context.uc_link = nullptr;
  makecontext(&f->context, fiber_main, 0);
  return f;
}

inline void wait_for(State what, int operation) {
  current->operation = operation;
  current->state = what;
  yield();
}

// Show `bytes` of a lane's value to its warp; once every lane has done so, returns what all 32
// showed. Two sets of slots take turns, so that a lane may start the next operation while others
// still read this one.
inline const Lane* exchange(int operation, const void* value, size_t bytes) {
  auto& lanes = slots[current->turn++ & 1][current->number / 32];
  if (bytes) memcpy(lanes[current->number % 32].bytes, value, bytes);
  wait_for(kWarp, operation);
  return lanes.data();
}

// Release the threads for which all others that they wait for have arrived. False: none can ever
// move again.
inline bool release(size_t threads) {
  size_t done = 0, at_barrier = 0, ready = 0;
  for (size_t w = 0; w < threads; w += 32) {
    size_t waiting = 0, same = 0;
    for (size_t i = w; i < w + 32; ++i) {
      State s = fibers[i]->state;
      done += s == kDone;
      at_barrier += s == kBlock;
      ready += s == kReady;
      waiting += s == kWarp;
      same += s == kWarp && fibers[i]->operation == fibers[w]->operation;
    }
    if (waiting < 32) continue;
    if (same < 32) {
      fault("lanes of one warp are in different operations");
      return false;
    }
    for (size_t i = w; i < w + 32; ++i) fibers[i]->state = kReady;
    ready += 32;
  }
  if (at_barrier == threads) {
    for (size_t i = 0; i < threads; ++i) fibers[i]->state = kReady;
    ready += threads;
  }
  if (ready || done == threads) return true;
  fault("threads wait at a barrier that others passed or never reached");
  return false;
}

inline bool run_block(size_t threads) {
  std::vector<size_t> order(threads);
  for (size_t i = 0; i < threads; ++i) {
    order[i] = i;
    fibers[i]->state = kReady;
  }
  for (size_t done = 0; done < threads;) {
    std::shuffle(order.begin(), order.end(), random);
    uint32_t asleep = random() & random();  // each warp is held back a quarter of the time
    for (size_t i : order) {
      if (fibers[i]->state != kReady || asleep >> (i / 32) & 1) continue;
      enter(current = fibers[i].get());
      if (error) return false;
      done += fibers[i]->state == kDone;
    }
    if (!release(threads)) return false;
  }
  return true;
}

inline void launch(const void* kernel, dim3 grid, dim3 block, size_t shared,
                   std::function<void()> call) {
  size_t threads = size_t(block.x) * block.y * block.z;
  size_t blocks = size_t(grid.x) * grid.y * grid.z;
  bool too_large = threads > 1024 || grid.y > 65535 || grid.z > 65535;
  if (!threads || !blocks || too_large || threads % 32)
    return fault("launch outside the limits of a GPU, or not of whole warps");
  if (shared > (shared_allowed.count(kernel) ? shared_allowed[kernel] : kSharedDefault))
    return fault("more dynamic shared memory than cudaFuncSetAttribute asked for");
  while (fibers.size() < threads) fibers.emplace_back(new_fiber());
  for (auto& s : slots) s.assign(threads / 32, std::vector<Lane>(32));
  for (size_t i = 0; i < threads; ++i) {
    fibers[i]->index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    fibers[i]->number = int(i);
    fibers[i]->turn = 0;
    fibers[i]->group = 0;
  }
  body = call;
  block_size = block;
  grid_size = grid;
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (size_t b : order) {
    block_index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    std::unique_ptr<void, void (*)(void*)> memory(aligned_alloc(16, (shared + 15) / 16 * 16), free);
    shared_memory = static_cast<unsigned char*>(memory.get());
    memset(shared_memory, 0xFF, shared);
    if (!run_block(threads))
      return fibers.clear();  // stuck fibers are thrown away with their stacks
  }
}

inline bool aligned16(const void* p) {
  if (uintptr_t(p) % 16) fault("a 16-byte access is not aligned");
  return uintptr_t(p) % 16 == 0;
}

inline void needs(int capability) {
  if (major < capability) fault("an instruction that this device lacks");
}

// The 32 banks of shared memory hold 128 bytes side by side: eight rows of 16 bytes fit in one go.
inline void check_banks(const Lane* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned places = 0;
    for (int row = 0; row < 8; ++row) {
      uintptr_t address;
      memcpy(&address, lanes[matrix * 8 + row].bytes, sizeof address);
      places |= 1u << address / 16 % 8;
    }
    if (places != 0xFF) fault("rows that ldmatrix reads at once share banks");
  }
}
}  // namespace emu
