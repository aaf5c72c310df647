#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

#include "fibre.h"

namespace emulator {
namespace {

enum class Status { kReady, kAtBarrier, kInWarp, kExited };

struct Thread {
  Status status = Status::kReady;
  CallSite site = {};
  const char* what = "";  // the collective it waits at
  uint64_t sent = 0;
  uint64_t received = 0;
  int source = 0;
};

struct SharedArray {
  CallSite site;
  std::vector<uint64_t> memory;
};

/// The numbers of threads, in runs: "0-31, 64".
std::string list(const std::vector<int>& threads) {
  std::ostringstream text;
  for (size_t i = 0; i < threads.size();) {
    size_t end = i + 1;
    while (end < threads.size() && threads[end] == threads[end - 1] + 1) ++end;
    text << (i ? ", " : "") << threads[i];
    if (end - i > 1) text << '-' << threads[end - 1];
    i = end;
  }
  return text.str();
}

/// The kernel's name in the signature of a function template whose parameter it is.
std::string kernel_name(const std::string& signature) {
  const std::string before = "kernel = ";
  const size_t begin = signature.find(before);
  if (begin == std::string::npos) return signature;
  const size_t end = signature.find(';', begin);
  return signature.substr(begin + before.size(), end - begin - before.size());
}

/// One launch; its fibres serve all its blocks in turn.
class Launch {
 public:
  Launch(const char* kernel, int64_t blocks, int threads, const std::function<void()>& body, uint64_t seed)
      : blocks(blocks), body_(body), kernel_(kernel_name(kernel)), random_(seed), fibres_(threads), threads_(threads) {
    if (threads % kWarpSize != 0) throw KernelError(kernel_ + ": blocks must consist of whole warps");
    for (auto& fibre : fibres_) fibre = std::make_unique<Fibre>();
  }

  void run() {
    std::vector<int64_t> order(blocks);
    for (int64_t i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    for (const int64_t index : order) {
      block = index;
      run_block();
    }
  }

  Thread& running() { return threads_[thread]; }
  int thread_count() const { return static_cast<int>(threads_.size()); }

  /// Called on a fibre: goes back to the scheduler until the meeting at `site` is complete.
  void wait(Status status, const char* what, CallSite site) {
    Thread& self = running();
    self.status = status;
    self.what = what;
    self.site = site;
    fibres_[thread]->suspend();
  }

  void* shared(size_t bytes, CallSite site) {
    for (SharedArray& array : shared_) {
      if (array.site == site) return array.memory.data();
    }
    // All bits set is NaN in every floating-point type.
    shared_.push_back({site, std::vector<uint64_t>((bytes + 7) / 8, ~uint64_t{0})});
    return shared_.back().memory.data();
  }

  std::string place() const {
    std::ostringstream text;
    text << "kernel " << kernel_ << ", block " << block;
    return text.str();
  }

  const int64_t blocks;
  int64_t block = 0;
  int thread = 0;

 private:
  void run_block() {
    shared_.clear();
    ready_.clear();
    for (int i = 0; i < thread_count(); ++i) {
      threads_[i] = Thread();
      ready_.push_back(i);
      fibres_[i]->start([this] { run_thread(); });
    }
    while (!ready_.empty()) {
      const size_t pick = std::uniform_int_distribution<size_t>(0, ready_.size() - 1)(random_);
      thread = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      fibres_[thread]->resume();
      if (error_) std::rethrow_exception(error_);
      if (running().status == Status::kInWarp) meet_in_warp(thread / kWarpSize * kWarpSize);
      if (running().status == Status::kAtBarrier) meet(0, thread_count());
    }
    for (const Thread& each : threads_) {
      if (each.status != Status::kExited) throw KernelError(place() + ": threads diverge: " + whereabouts());
    }
  }

  void run_thread() {
    try {
      body_();
    } catch (...) {
      error_ = std::current_exception();
    }
    running().status = Status::kExited;
  }

  /// Whether all threads of a range wait at the same place; if so they are ready to go on.
  bool meet(int begin, int end) {
    for (int i = begin; i < end; ++i) {
      if (threads_[i].status != running().status || !(threads_[i].site == running().site)) return false;
    }
    for (int i = begin; i < end; ++i) {
      threads_[i].status = Status::kReady;
      ready_.push_back(i);
    }
    return true;
  }

  void meet_in_warp(int begin) {
    if (!meet(begin, begin + kWarpSize)) return;
    for (int i = begin; i < begin + kWarpSize; ++i) threads_[i].received = threads_[begin + threads_[i].source].sent;
  }

  std::string whereabouts() const {
    struct Group {
      std::string where;
      std::vector<int> threads;
    };
    std::vector<Group> groups;
    for (int i = 0; i < thread_count(); ++i) {
      const Thread& each = threads_[i];
      const std::string where =
          each.status == Status::kExited ? "exited" : std::string("wait at ") + each.what + " in " + each.site.text();
      const auto same = [&](const Group& group) { return group.where == where; };
      auto group = std::find_if(groups.begin(), groups.end(), same);
      if (group == groups.end()) group = groups.insert(group, {where, {}});
      group->threads.push_back(i);
    }
    std::ostringstream text;
    for (size_t i = 0; i < groups.size(); ++i) {
      text << (i ? "; " : "") << "threads " << list(groups[i].threads) << ' ' << groups[i].where;
    }
    return text.str();
  }

  const std::function<void()>& body_;
  const std::string kernel_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::vector<Thread> threads_;
  std::vector<int> ready_;
  std::vector<SharedArray> shared_;
  std::exception_ptr error_;
};

Launch* current = nullptr;
uint64_t seed_of_launches = 0;

}  // namespace

bool CallSite::operator==(const CallSite& other) const {
  return line == other.line && std::strcmp(file, other.file) == 0;
}

std::string CallSite::text() const {
  const char* const slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ':' + std::to_string(line);
}

void set_seed(uint64_t seed) { seed_of_launches = seed; }

void run(const char* kernel, int64_t blocks, int threads, const std::function<void()>& body) {
  Launch launch(kernel, blocks, threads, body, seed_of_launches);
  struct Current {
    explicit Current(Launch* of) { current = of; }
    ~Current() { current = nullptr; }
  } guard(&launch);
  launch.run();
}

int thread_index() { return current->thread; }
int block_threads() { return current->thread_count(); }
int64_t block_index() { return current->block; }
int64_t block_count() { return current->blocks; }

void block_barrier(CallSite site) { current->wait(Status::kAtBarrier, "a block barrier", site); }

uint64_t exchange(uint64_t sent, int source, const char* what, CallSite site) {
  Thread& self = current->running();
  self.sent = sent;
  self.source = source % kWarpSize;
  current->wait(Status::kInWarp, what, site);
  return self.received;
}

void* shared_memory(size_t bytes, CallSite site) { return current->shared(bytes, site); }

void check_alignment(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  throw KernelError(current->place() + ", thread " + std::to_string(current->thread) + ": " + what + " of " +
                    std::to_string(bytes) + " bytes at an address that is no multiple of it");
}

}  // namespace emulator
