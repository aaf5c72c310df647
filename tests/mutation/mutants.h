// Stands in for operators and conditions of kernels, all of whose mutants are compiled into one library: the
// environment variable LLAVA_ST_MUTANT chooses the one that is alive. schemata.py writes the code that uses this.
//
// `a <Compare<7>{}< b` is `(a < Compare<7>{}) < b`: an operator between two others has their precedence, so that no
// operand needs to be found.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#define LLAVA_ST_UNSEEN __attribute__((no_sanitize("thread", "undefined"), noinline))

namespace mutants {

/// Which mutants the tests reach, and which are none because no integers are multiplied; written to the file
/// LLAVA_ST_MUTANTS_REACHED at the end.
class Reached {
 public:
  LLAVA_ST_UNSEEN void note(int mutant) { kinds_[mutant] = 'r'; }
  LLAVA_ST_UNSEEN void note_other_type(int mutant) {
    if (kinds_[mutant] == 0) kinds_[mutant] = 'o';
  }
  ~Reached() {
    const char* const path = std::getenv("LLAVA_ST_MUTANTS_REACHED");
    FILE* const file = path != nullptr ? std::fopen(path, "w") : nullptr;
    if (file == nullptr) return;
    for (int mutant = 0; mutant < kMost; ++mutant) {
      if (kinds_[mutant] != 0) std::fprintf(file, "%d %c\n", mutant, kinds_[mutant]);
    }
    std::fclose(file);
  }

 private:
  static constexpr int kMost = 10000;
  char kinds_[kMost] = {};
};

inline Reached reached;

LLAVA_ST_UNSEEN inline bool alive(int mutant) {
  static const int chosen = [] {
    const char* const text = std::getenv("LLAVA_ST_MUTANT");
    return text != nullptr ? std::atoi(text) : -1;
  }();
  reached.note(mutant);
  return mutant == chosen;
}

/// A comparison: mutant FIRST is its contrary; of an order, mutant FIRST + 1 is the same but for equal operands.
template <int FIRST>
struct Compare {};
template <int FIRST, class A>
struct Compared {
  A a;
};

constexpr bool is_order(const char* op) { return op[0] == '<' || op[0] == '>'; }

#define LLAVA_ST_COMPARE(op, contrary, loosened)                     \
  template <int FIRST, class A>                                      \
  Compared<FIRST, A> operator op(A a, Compare<FIRST>) {              \
    return {a};                                                      \
  }                                                                  \
  template <int FIRST, class A, class B>                             \
  bool operator op(Compared<FIRST, A> left, B b) {                   \
    if (alive(FIRST)) return left.a contrary b;                      \
    if (is_order(#op) && alive(FIRST + 1)) return left.a loosened b; \
    return left.a op b;                                              \
  }
LLAVA_ST_COMPARE(<, >=, <=)
LLAVA_ST_COMPARE(<=, >, <)
LLAVA_ST_COMPARE(>, <=, >=)
LLAVA_ST_COMPARE(>=, <, >)
LLAVA_ST_COMPARE(==, !=, ==)
LLAVA_ST_COMPARE(!=, ==, !=)
#undef LLAVA_ST_COMPARE

/// A product, quotient or remainder of integers, and another operator in its place.
template <int MUTANT>
struct Index {};
template <int MUTANT, class A>
struct Indexed {
  A a;
};

#define LLAVA_ST_INDEX(op, other)                                                   \
  template <int MUTANT, class A>                                                    \
  Indexed<MUTANT, A> operator op(A a, Index<MUTANT>) {                              \
    return {a};                                                                     \
  }                                                                                 \
  template <int MUTANT, class A, class B>                                           \
  auto operator op(Indexed<MUTANT, A> left, B b) {                                  \
    if constexpr (std::is_integral_v<A> && std::is_integral_v<B>) {                 \
      if (alive(MUTANT)) return static_cast<decltype(left.a op b)>(left.a other b); \
    } else {                                                                        \
      reached.note_other_type(MUTANT);                                              \
    }                                                                               \
    return left.a op b;                                                             \
  }
LLAVA_ST_INDEX(*, +)
LLAVA_ST_INDEX(/, %)
LLAVA_ST_INDEX(%, /)
#undef LLAVA_ST_INDEX

/// One stride or size, and another in its place.
template <int MUTANT, class A, class B>
A swapped(A a, B b) {
  return alive(MUTANT) ? static_cast<A>(b) : a;
}

}  // namespace mutants
