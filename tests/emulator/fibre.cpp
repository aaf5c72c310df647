#include "fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

// Sanitizers and their redzones need far more stack than kernels do.
constexpr size_t kStackBytes = 256 * 1024;

}  // namespace

#if defined(__x86_64__)

// Saves the registers that a call preserves on this stack, goes to another stack and restores them from there.
// swapcontext does the same and a system call besides.
extern "C" void llava_st_switch_stack(void** from, void* to);
asm(R"(
.text
.type llava_st_switch_stack, @function
llava_st_switch_stack:
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
.size llava_st_switch_stack, .-llava_st_switch_stack
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(void* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
    *--top = nullptr;  // where `entry` would return to; it never does
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }

  void switch_to(Context& other) { llava_st_switch_stack(&stack_pointer, other.stack_pointer); }
};

#else

struct Context {
  ucontext_t context;

  void prepare(void* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }

  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};

#endif

struct Fibre::State {
  char* mapping = nullptr;
  size_t guard = 0;  // bytes below the stack that trap an overflow
  std::function<void()> body;
  Context own, caller;
  void* own_fake_stack = nullptr;
  const void* caller_stack = nullptr;
  size_t caller_stack_bytes = 0;

  char* stack() const { return mapping + guard; }

  // The address sanitizer wants to know of every change of stack.
  void switch_in() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack(), kStackBytes);
    caller.switch_to(own);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    caller.switch_to(own);
#endif
  }

  void switch_out(bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &own_fake_stack, caller_stack, caller_stack_bytes);
    own.switch_to(caller);
    arrived();
#else
    static_cast<void>(for_good);
    own.switch_to(caller);
#endif
  }

  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own_fake_stack, &caller_stack, &caller_stack_bytes);
#endif
  }

  static State* starting;

  static void entry() {
    State* const state = starting;
    state->arrived();
    state->body();
    state->switch_out(true);
  }
};

Fibre::State* Fibre::State::starting = nullptr;

Fibre::Fibre() : state_(std::make_unique<State>()) {
  state_->guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const mapping = mmap(nullptr, state_->guard + kStackBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  state_->mapping = static_cast<char*>(mapping);
  mprotect(mapping, state_->guard, PROT_NONE);
}

Fibre::~Fibre() { munmap(state_->mapping, state_->guard + kStackBytes); }

void Fibre::start(std::function<void()> body) {
  state_->body = std::move(body);
  state_->own_fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(state_->stack(), kStackBytes);  // of frames that an earlier run left behind
#endif
  state_->own.prepare(state_->stack(), kStackBytes, &State::entry);
}

void Fibre::resume() {
  State::starting = state_.get();  // read only where the fibre starts
  state_->switch_in();
}

void Fibre::suspend() { state_->switch_out(false); }

AddressRange Fibre::stack() const {
  const auto begin = reinterpret_cast<uintptr_t>(state_->stack());
  return {begin, begin + kStackBytes};
}

}  // namespace emulator
