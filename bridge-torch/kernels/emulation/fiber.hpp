// One CUDA thread as a coroutine: a stack of its own and a switch that keeps the callee-saved registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

inline constexpr size_t kStackBytes = size_t{64} << 10;

#if defined(__x86_64__)

// Weak, because the operator library has it once a source file.
// A ucontext switch asks the kernel for the signal mask each time, which is most of what a barrier would cost.
extern "C" void bridge_emulation_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.weak bridge_emulation_switch
.hidden bridge_emulation_switch
.type bridge_emulation_switch, @function
bridge_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size bridge_emulation_switch, .-bridge_emulation_switch
)");

class Fiber {
 public:
  // Starts again at `entry`, which must never return.
  void reset(void (*entry)()) {
    if (!stack_) {
      stack_ = std::make_unique<unsigned char[]>(kStackBytes);
    }
    uintptr_t top = reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes;
    top &= ~uintptr_t{15};
    uintptr_t* frame = reinterpret_cast<uintptr_t*>(top) - 8;
    for (int i = 0; i < 6; ++i) {
      frame[i] = 0;
    }
    frame[6] = reinterpret_cast<uintptr_t>(entry);
    frame[7] = 0;
    top_ = frame;
  }
  void enter() { bridge_emulation_switch(&outside_, top_); }
  void leave() { bridge_emulation_switch(&top_, outside_); }

 private:
  std::unique_ptr<unsigned char[]> stack_;
  void* top_ = nullptr;
  void* outside_ = nullptr;
};

#else

class Fiber {
 public:
  void reset(void (*entry)()) {
    if (!stack_) {
      stack_ = std::make_unique<unsigned char[]>(kStackBytes);
    }
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_.get();
    inside_.uc_stack.ss_size = kStackBytes;
    inside_.uc_link = nullptr;
    makecontext(&inside_, entry, 0);
  }
  void enter() { swapcontext(&outside_, &inside_); }
  void leave() { swapcontext(&inside_, &outside_); }

 private:
  std::unique_ptr<unsigned char[]> stack_;
  ucontext_t inside_{}, outside_{};
};

#endif

}  // namespace emulation
