// Tensors for the CPU kernels, in memory that sanitizers watch.
#pragma once

#include <cstdlib>
#include <cstring>
#include <vector>

#include "cases.h"
#include "checks.h"
#include "cpu/huge_pages.h"
#include "elements.h"

namespace llava_st::tests {

enum View { kContiguous, kSliced, kHeadsFirst, kViews };
inline constexpr const char* kViewNames[] = {"contiguous", "sliced", "heads first"};

/// A `[rows, heads, dim]` tensor whose rows may lie apart, in an allocation that ends with its last element.
template <class T>
class Tensor {
 public:
  /// The first element is `shift` elements into the allocation.
  Tensor(const Rows& rows, int64_t heads, int64_t dim, View view, int64_t shift)
      : rows_(rows), heads_(heads), dim_(dim), lead_(shift) {
    const auto& size = rows.sizes;
    const int64_t more = view == kSliced;  // a slice: there is more along every axis than is asked for
    if (view == kHeadsFirst) {
      strides_ = {0, 0, 0, dim, 0};
    } else {
      strides_ = {0, 0, 0, (heads + more) * (dim + more), dim + more};
    }
    strides_.h = (size[3] + more) * strides_.w;
    strides_.t = (size[2] + more) * strides_.h;
    strides_.sample = (size[1] + more) * strides_.t;
    if (view == kHeadsFirst) strides_.head = size[0] * strides_.sample;
    elements_ = lead_ + offset({size[0] - 1, size[1] - 1, size[2] - 1, size[3] - 1}, heads - 1) + dim;
    allocate();
  }
  ~Tensor() { std::free(memory_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  cpu::Operand operand() const { return {memory_ + lead_, strides_}; }
  void fill_with_nan() { std::memset(static_cast<void*>(memory_), 0xff, bytes()); }

  /// Calls `visit(i, element)` for element number i as counted in a contiguous tensor.
  template <class Visit>
  void for_elements(Visit visit) {
    size_t i = 0;
    for (const auto& place : rows_.places) {
      for (int64_t head = 0; head < heads_; ++head) {
        T* const row = memory_ + lead_ + offset(place, head);
        for (int64_t d = 0; d < dim_; ++d) visit(i++, row[d]);
      }
    }
  }

  std::vector<char> contents() const {
    const auto* const first = reinterpret_cast<const char*>(memory_);
    return {first, first + bytes()};
  }

  /// Whether all that is no element, in front of rows and between them, is still as fill_with_nan left it. Fills the
  /// elements likewise.
  bool untouched_between_rows() {
    for_elements([](size_t, T& element) { std::memset(static_cast<void*>(&element), 0xff, sizeof(T)); });
    const auto* const all = reinterpret_cast<const unsigned char*>(memory_);
    return all[0] == 0xff && std::memcmp(all, all + 1, bytes() - 1) == 0;
  }

  /// What is wrong with a tensor for `--break`: its last element does not exist.
  void lose_last_element() {
    std::free(memory_);
    --elements_;
    allocate();
    std::memset(static_cast<void*>(memory_), 0, bytes());
  }

 private:
  size_t bytes() const { return static_cast<size_t>(elements_) * sizeof(T); }
  int64_t offset(const std::array<int64_t, 4>& place, int64_t head) const {
    return place[0] * strides_.sample + strides_.offset({place[1], place[2], place[3]}) + head * strides_.head;
  }
  void allocate() {
    void* memory = nullptr;
    check(posix_memalign(&memory, 64, bytes()) == 0, "posix_memalign");  // aligned like torch's, so results stream
    memory_ = static_cast<T*>(memory);
    cpu::advise_huge_pages(memory, static_cast<int64_t>(bytes()));
    fill_with_nan();
  }

  Rows rows_;
  int64_t heads_, dim_, lead_, elements_;
  TokenStrides strides_;
  T* memory_;
};

template <class T>
struct Tensors {
  Tensor<T> query, key, value, grad_output;
  Tensor<T> output, grad_query, grad_key, grad_value;
  Tensor<T> bias, grad_bias;  // rows of one number
  bool biased;

  /// torch makes results contiguous and aligned. Here they are as the inputs, which shows what is written beside their
  /// rows; but kernels may then not take them to be aligned, so one that they ask about is shifted.
  Tensors(const Case& a, const Rows& queries, const Rows& keys, View view)
      : query(queries, a.heads, a.dim, view, view == kSliced),
        key(keys, a.heads, a.dim, view, view == kSliced),
        value(keys, a.heads, a.value_dim(), view, view == kSliced),
        grad_output(queries, a.heads, a.value_dim(), view, view == kSliced),
        output(queries, a.heads, a.value_dim(), view, view == kSliced),
        grad_query(queries, a.heads, a.dim, view, view == kSliced),
        grad_key(keys, a.heads, a.dim, view, view == kHeadsFirst),
        grad_value(keys, a.heads, a.value_dim(), view, view == kSliced),
        bias(keys, a.heads, 1, view, view == kSliced),
        grad_bias(keys, a.heads, 1, view, view == kSliced),
        biased(a.biased) {}

  cpu::ForwardOperands forward() const {
    return {query.operand(), key.operand(), value.operand(), output.operand(), bias_or_none(bias)};
  }
  cpu::BackwardOperands backward() const {
    return {grad_output.operand(), query.operand(),      key.operand(),
            value.operand(),       grad_query.operand(), grad_key.operand(),
            grad_value.operand(),  bias_or_none(bias),   bias_or_none(grad_bias)};
  }

 private:
  cpu::Operand bias_or_none(const Tensor<T>& tensor) const { return biased ? tensor.operand() : cpu::Operand{}; }
};

}  // namespace llava_st::tests
