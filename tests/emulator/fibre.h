// Fibres: threads of execution that are switched by hand, on stacks of their own. One emulated GPU thread is one fibre.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace emulator {

struct AddressRange {
  uintptr_t begin = 0, end = 0;

  bool contains(uintptr_t from, size_t bytes) const { return from >= begin && from + bytes <= end; }
};

class Fibre {
 public:
  Fibre();
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  /// Makes the fibre run `body` from its beginning at the next `resume`; whatever it was doing is forgotten. `body`
  /// must not throw.
  void start(std::function<void()> body);

  /// Runs the fibre until it calls `suspend` or ends.
  void resume();

  /// Called on the fibre: goes back to where `resume` was called.
  void suspend();

  AddressRange stack() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace emulator
