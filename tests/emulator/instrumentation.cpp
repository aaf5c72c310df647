// What instrumented code calls. With -fsanitize=thread the compiler reports every access to memory to a runtime
// library, with -fsanitize=undefined all undefined behaviour; this file stands in for both libraries.
#include <cstddef>
#include <cstdint>

#include "access.h"

using emulator::Use;

namespace {

inline void access(const void* address, size_t bytes, Use use, const void* code) {
  if (emulator::accesses_are_checked && bytes > 0) emulator::check_access(address, bytes, use, code);
}

}  // namespace

extern "C" {

#define LLAVA_ST_ACCESS(bytes)                                                                                \
  void __tsan_read##bytes(void* at) { access(at, bytes, Use::kRead, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* at) { access(at, bytes, Use::kWrite, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##bytes(void* at) { access(at, bytes, Use::kRead, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { access(at, bytes, Use::kWrite, __builtin_return_address(0)); }
LLAVA_ST_ACCESS(1)
LLAVA_ST_ACCESS(2)
LLAVA_ST_ACCESS(4)
LLAVA_ST_ACCESS(8)
LLAVA_ST_ACCESS(16)
#undef LLAVA_ST_ACCESS

void __tsan_read_range(void* at, size_t bytes) { access(at, bytes, Use::kRead, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t bytes) { access(at, bytes, Use::kWrite, __builtin_return_address(0)); }

// The linker sends calls of these functions here (--wrap): the compiler makes them for large copies, uninstrumented.
void* __real_memcpy(void* to, const void* from, size_t bytes);
void* __real_memmove(void* to, const void* from, size_t bytes);
void* __real_memset(void* to, int value, size_t bytes);
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  access(from, bytes, Use::kRead, __builtin_return_address(0));
  access(to, bytes, Use::kWrite, __builtin_return_address(0));
  return __real_memcpy(to, from, bytes);
}
void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  access(from, bytes, Use::kRead, __builtin_return_address(0));
  access(to, bytes, Use::kWrite, __builtin_return_address(0));
  return __real_memmove(to, from, bytes);
}
void* __wrap_memset(void* to, int value, size_t bytes) {
  access(to, bytes, Use::kWrite, __builtin_return_address(0));
  return __real_memset(to, value, bytes);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Atomics of the host's code: reference counts and guards of static variables. Kernels' own go through the thin layer.
int8_t __tsan_atomic8_load(const volatile int8_t* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
int32_t __tsan_atomic32_load(const volatile int32_t* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
int32_t __tsan_atomic32_fetch_add(volatile int32_t* at, int32_t by, int) {
  return __atomic_fetch_add(at, by, __ATOMIC_SEQ_CST);
}

// Every report of undefined behaviour begins with the place in the source.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

#define LLAVA_ST_UNDEFINED(name, what)                              \
  void __ubsan_handle_##name(const SourceLocation* at) {            \
    emulator::report_undefined_behaviour(what, at->file, at->line); \
  }
LLAVA_ST_UNDEFINED(add_overflow, "an integer sum overflows")
LLAVA_ST_UNDEFINED(sub_overflow, "an integer difference overflows")
LLAVA_ST_UNDEFINED(mul_overflow, "an integer product overflows")
LLAVA_ST_UNDEFINED(negate_overflow, "an integer overflows when negated")
LLAVA_ST_UNDEFINED(divrem_overflow, "an integer is divided by zero, or the quotient overflows")
LLAVA_ST_UNDEFINED(shift_out_of_bounds, "a shift by too many bits, or of a negative number")
LLAVA_ST_UNDEFINED(float_cast_overflow, "a float is converted to an integer that cannot hold it")
LLAVA_ST_UNDEFINED(out_of_bounds, "an index is not in its array")
LLAVA_ST_UNDEFINED(pointer_overflow, "a pointer overflows")
LLAVA_ST_UNDEFINED(type_mismatch_v1, "a null or misaligned pointer is used")
LLAVA_ST_UNDEFINED(load_invalid_value, "a value that its type does not have")
LLAVA_ST_UNDEFINED(builtin_unreachable, "code is reached that never should be")
LLAVA_ST_UNDEFINED(missing_return, "a function ends without its result")
LLAVA_ST_UNDEFINED(vla_bound_not_positive, "an array's size is not positive")
LLAVA_ST_UNDEFINED(nonnull_arg, "an argument is null that must not be")
LLAVA_ST_UNDEFINED(nonnull_return_v1, "a result is null that must not be")
LLAVA_ST_UNDEFINED(invalid_builtin, "a builtin function gets an argument that it cannot take")
#undef LLAVA_ST_UNDEFINED

}  // extern "C"
