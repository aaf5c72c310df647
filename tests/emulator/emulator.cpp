#include "emulator.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "access.h"
#include "clocks.h"
#include "fibre.h"
#include "memory.h"
#include "source_lines.h"

namespace emulator {
namespace {

enum class Status { kReady, kAtBarrier, kInWarp, kExited };

struct Thread {
  Status status = Status::kReady;
  CallSite site;
  const char* what = "";  // the meeting that it waits for
  uint32_t lanes = 0;     // of a warp collective
  void* brought = nullptr;
  Complete complete = nullptr;
  bool orders_memory = false;
  int committed_groups = 0;
};

struct SharedArray {
  CallSite site;
  std::string name;
  size_t bytes;
  void* data;
  std::unique_ptr<char[]> memory;
};

struct PendingCopy {
  int thread;
  int group;
  uintptr_t to, from;  // `from` is zero where zeros are written
  size_t bytes;
  const void* code;
};

bool same(const CallSite& a, const CallSite& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0 &&
         std::strcmp(a.function_name(), b.function_name()) == 0;
}

bool overlap(uintptr_t a, size_t a_bytes, uintptr_t b, size_t b_bytes) { return a < b + b_bytes && b < a + a_bytes; }

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string text_of(const CallSite& site) {
  return base_name(site.file_name()) + ':' + std::to_string(site.line()) + ':' + std::to_string(site.column());
}

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
  const size_t end = signature.find("; Arguments", begin);
  return signature.substr(begin + before.size(), end - begin - before.size());
}

Memory memory;
Settings current_settings;
std::map<std::string, int64_t> current_launches;
std::string undefined_in_launcher;

/// Fibres are kept from launch to launch.
Fibre& fibre(int thread) {
  static std::vector<std::unique_ptr<Fibre>> fibres;
  while (static_cast<int>(fibres.size()) <= thread) fibres.push_back(std::make_unique<Fibre>());
  return *fibres[thread];
}

/// The program itself: its constants are no memory of a launch, but may be read.
AddressRange find_program() {
  AddressRange range;
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* result) {
        const auto here = reinterpret_cast<uintptr_t>(&find_program);
        uintptr_t begin = ~uintptr_t{0}, end = 0;
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const auto& segment = module->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD) continue;
          begin = std::min(begin, module->dlpi_addr + segment.p_vaddr);
          end = std::max(end, module->dlpi_addr + segment.p_vaddr + segment.p_memsz);
        }
        if (here < begin || here >= end) return 0;
        *static_cast<AddressRange*>(result) = {begin, end};
        return 1;
      },
      &range);
  return range;
}

const AddressRange program = find_program();

/// One launch; its fibres serve all its blocks in turn.
class Launch {
 public:
  Launch(const char* kernel, int64_t blocks, int threads, std::function<void()> body, uint64_t seed)
      : blocks(blocks),
        body_(std::move(body)),
        kernel_(kernel_name(kernel)),
        seed_(seed),
        random_(seed),
        threads_(threads) {
    if (threads % kWarpSize != 0) throw KernelError(kernel_ + ": blocks must consist of whole warps");
    if (threads > 1024) throw KernelError(kernel_ + ": blocks have at most 1024 threads");
    memory.begin_launch();
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

  Thread& self() { return threads_[thread]; }
  int thread_count() const { return static_cast<int>(threads_.size()); }

  /// Called on a fibre: goes back to the scheduler until the meeting at `site` is complete.
  void wait(Status status, const char* what, CallSite site) {
    self().status = status;
    self().what = what;
    self().site = site;
    suspend();
  }

  /// Called on a fibre, which never goes on.
  [[noreturn]] void fail(const std::string& what) {
    report(what);
    suspend();
    std::abort();
  }

  /// Notes what the running thread did wrong. The launch ends when the thread next stops.
  void report(const std::string& what) {
    if (error_.empty()) error_ = place() + ", thread " + std::to_string(thread) + " " + what + seed_text();
  }

  void* shared(size_t bytes, size_t alignment, const char* name, CallSite site) {
    for (const SharedArray& array : shared_) {
      if (same(array.site, site) && array.name == name && array.bytes == bytes) return array.data;
    }
    constexpr size_t kMost = 16;
    auto memory_of_array = std::make_unique<char[]>(bytes + 2 * kMost);
    void* data = memory_of_array.get();
    size_t space = bytes + 2 * kMost;
    std::align(kMost, bytes + kMost, data, space);
    if (alignment < kMost) data = static_cast<char*>(data) + alignment;  // and not a multiple of more
    std::memset(data, 0xff, bytes);                                      // NaN in every floating-point type
    memory.allow(data, bytes, Space::kShared, std::string("shared memory `") + name + "`");
    shared_.push_back({site, name, bytes, data, std::move(memory_of_array)});
    return data;
  }

  void access(uintptr_t begin, size_t bytes, Use use, const void* code) {
    check_pending_copies(begin, bytes, use, code);
    const std::string problem = memory.check({begin, bytes, use, code}, thread, clocks_);
    if (!problem.empty()) fail(problem + ", at " + source_line(code));
  }

  void start_copy(void* to, const void* from, size_t bytes, const void* code) {
    const auto target = reinterpret_cast<uintptr_t>(to), source = reinterpret_cast<uintptr_t>(from);
    if (!memory.is_shared(to, bytes) || (from != nullptr && memory.is_shared(from, bytes))) {
      fail("starts an asynchronous copy that is not from global to shared memory, at " + source_line(code));
    }
    if (from != nullptr) access(source, bytes, Use::kRead, code);
    access(target, bytes, Use::kWrite, code);
    pending_.push_back({thread, self().committed_groups, target, source, bytes, code});
  }

  void finish_copies(int pending_groups) {
    const int finished = self().committed_groups - pending_groups;
    std::vector<PendingCopy> done;
    const auto is_done = [&](const PendingCopy& copy) { return copy.thread == thread && copy.group < finished; };
    std::copy_if(pending_.begin(), pending_.end(), std::back_inserter(done), is_done);
    std::erase_if(pending_, is_done);
    for (const PendingCopy& copy : done) {
      void* const to = reinterpret_cast<void*>(copy.to);
      if (copy.from == 0) {
        std::memset(to, 0, copy.bytes);
      } else {
        std::memcpy(to, reinterpret_cast<const void*>(copy.from), copy.bytes);
      }
      if (copy.from != 0) access(copy.from, copy.bytes, Use::kRead, copy.code);  // as late as it may have been read
      access(copy.to, copy.bytes, Use::kWrite, copy.code);
    }
  }

  const int64_t blocks;
  int64_t block = 0;
  int thread = 0;

 private:
  void run_block() {
    ready_.clear();
    clocks_.begin_block(thread_count());
    for (int i = 0; i < thread_count(); ++i) {
      threads_[i] = Thread();
      ready_.push_back(i);
      fibre(i).start([this] {
        body_();
        self().status = Status::kExited;
      });
    }
    while (!ready_.empty()) {
      const size_t pick = std::uniform_int_distribution<size_t>(0, ready_.size() - 1)(random_);
      thread = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      resume();
      if (!error_.empty()) throw KernelError(error_);
      if (self().status == Status::kInWarp) meet_in_warp(thread / kWarpSize * kWarpSize, self().lanes);
      if (self().status == Status::kAtBarrier) meet_in_block();
    }
    for (const Thread& each : threads_) {
      if (each.status == Status::kExited) continue;
      throw KernelError(place() + ": threads diverge: " + whereabouts() + seed_text());
    }
    if (!pending_.empty()) {
      throw KernelError(place() + ", thread " + std::to_string(pending_[0].thread) +
                        " ends before the asynchronous copy that it starts at " + source_line(pending_[0].code) +
                        seed_text());
    }
    for (const SharedArray& array : shared_) memory.forget(array.data);
    shared_.clear();
  }

  void resume() {
    accesses_are_checked = true;
    stack = fibre(thread).stack();
    fibre(thread).resume();
    accesses_are_checked = false;
  }

  void suspend() { fibre(thread).suspend(); }

  void meet_in_block() {
    for (const Thread& other : threads_) {
      if (other.status != Status::kAtBarrier || !same(other.site, self().site)) return;
    }
    clocks_.block_barrier();
    for (int i = 0; i < thread_count(); ++i) release(i);
  }

  void meet_in_warp(int first, uint32_t lanes) {
    void* brought[kWarpSize] = {};
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      const Thread& other = threads_[first + lane];
      if (other.status != Status::kInWarp || other.lanes != lanes || !same(other.site, self().site)) return;
      brought[lane] = other.brought;
    }
    if (self().complete != nullptr) self().complete(brought);
    if (self().orders_memory) clocks_.warp_barrier(first, lanes);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes >> lane & 1) release(first + lane);
    }
  }

  void release(int i) {
    threads_[i].status = Status::kReady;
    ready_.push_back(i);
  }

  void check_pending_copies(uintptr_t begin, size_t bytes, Use use, const void* code) {
    for (const PendingCopy& copy : pending_) {
      const bool target = overlap(begin, bytes, copy.to, copy.bytes);
      const bool changes = use == Use::kWrite || use == Use::kAtomic;
      const bool source = changes && copy.from != 0 && overlap(begin, bytes, copy.from, copy.bytes);
      if (!target && !source) continue;
      fail("uses " + std::to_string(bytes) + " bytes at " + source_line(code) + " that are the " +
           (target ? "target" : "source") + " of an asynchronous copy, which thread " + std::to_string(copy.thread) +
           " starts at " + source_line(copy.code) + " and has not waited for");
    }
  }

  std::string place() const {
    std::ostringstream text;
    text << "kernel " << kernel_ << ", block " << block;
    return text.str();
  }

  std::string seed_text() const { return " (seed " + std::to_string(seed_) + ")"; }

  std::string whereabouts() const {
    struct Group {
      std::string where;
      std::vector<int> threads;
    };
    std::vector<Group> groups;
    for (int i = 0; i < thread_count(); ++i) {
      const Thread& each = threads_[i];
      std::ostringstream where;
      if (each.status == Status::kExited) {
        where << "exited";
      } else {
        where << "wait at " << each.what << " in " << text_of(each.site);
        if (each.status == Status::kInWarp && each.lanes != kFullWarp)
          where << " for lanes 0x" << std::hex << each.lanes;
      }
      const auto alike = [&](const Group& group) { return group.where == where.str(); };
      auto group = std::find_if(groups.begin(), groups.end(), alike);
      if (group == groups.end()) group = groups.insert(group, {where.str(), {}});
      group->threads.push_back(i);
    }
    std::ostringstream text;
    for (size_t i = 0; i < groups.size(); ++i) {
      text << (i ? "; " : "") << "threads " << list(groups[i].threads) << ' ' << groups[i].where;
    }
    return text.str();
  }

  const std::function<void()> body_;
  const std::string kernel_;
  const uint64_t seed_;
  std::mt19937_64 random_;
  Clocks clocks_;
  std::vector<Thread> threads_;
  std::vector<int> ready_;
  std::vector<SharedArray> shared_;
  std::vector<PendingCopy> pending_;
  std::string error_;
};

Launch* current = nullptr;

}  // namespace

bool accesses_are_checked = false;
AddressRange stack;

void check_access(const void* address, size_t bytes, Use use, const void* code) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (stack.contains(begin, bytes) || (use == Use::kRead && program.contains(begin, bytes))) return;
  const Pause pause;
  current->access(begin, bytes, use, code);
}

void report_undefined_behaviour(const char* what, const char* file, int line) {
  const bool in_kernel = accesses_are_checked;
  const Pause pause;
  const std::string text =
      std::string("undefined behaviour: ") + what + ", at " + base_name(file) + ':' + std::to_string(line);
  if (in_kernel) current->fail("has " + text);
  undefined_in_launcher = text;
}

Settings& settings() { return current_settings; }
std::map<std::string, int64_t>& launches() { return current_launches; }

void allow_reading(const void* data, size_t bytes) { memory.allow(data, bytes, Space::kInput, "an input"); }
void allow_writing(void* data, size_t bytes) { memory.allow(data, bytes, Space::kResult, "a result"); }
void allow_updating(void* data, size_t bytes) {
  memory.allow(data, bytes, Space::kResult, "an input that is updated");
  if (bytes > 0) memory.mark_written(data, bytes);
}
void forget_memory() { memory.forget(); }

void copy_to_device(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  if (!memory.mark_written(to, bytes)) throw KernelError("a copy to the device, to memory that is no result");
  std::memcpy(to, from, bytes);
}

void check_launchers() {
  if (undefined_in_launcher.empty()) return;
  throw KernelError("a launcher has " + std::exchange(undefined_in_launcher, ""));
}

std::mutex& lock() {
  static std::mutex mutex;
  return mutex;
}

void run(const char* kernel, int64_t blocks, int threads, void (*body)(const void*), const void* arguments) {
  if (blocks <= 0) throw KernelError(kernel_name(kernel) + ": a launch of " + std::to_string(blocks) + " blocks");
  Launch launch(kernel, blocks, threads, [=] { body(arguments); }, current_settings.seed++);
  ++current_launches[kernel_name(kernel)];
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

void block_barrier(CallSite site) {
  const Pause pause;
  current->wait(Status::kAtBarrier, "a block barrier", site);
}

void meet_in_warp(uint32_t lanes, const char* what, CallSite site, void* brought, Complete complete,
                  bool orders_memory) {
  const Pause pause;
  const int lane = current->thread % kWarpSize;
  if (!(lanes >> lane & 1)) {
    std::ostringstream text;
    text << "takes part in " << what << " in " << text_of(site) << " as lane " << lane
         << ", which is not among lanes 0x" << std::hex << lanes;
    current->fail(text.str());
  }
  Thread& self = current->self();
  self.lanes = lanes;
  self.brought = brought;
  self.complete = complete;
  self.orders_memory = orders_memory;
  current->wait(Status::kInWarp, what, site);
}

void note_error(const char* what) { current->report(what); }

void* shared_memory(size_t bytes, size_t alignment, const char* name, CallSite site) {
  const Pause pause;
  return current->shared(bytes, alignment, name, site);
}

void check_alignment(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  const void* const code = __builtin_return_address(0);
  const Pause pause;
  current->fail(std::string("makes ") + what + " of " + std::to_string(bytes) +
                " bytes at an address that is no multiple of it, at " + source_line(code));
}

void announce_load(const void* address, size_t bytes) {
  check_access(address, bytes, Use::kReadOnly, __builtin_return_address(0));
}

void announce_read(const void* address, size_t bytes) {
  check_access(address, bytes, Use::kRead, __builtin_return_address(0));
}

void announce_store(void* address, size_t bytes) {
  check_access(address, bytes, Use::kWrite, __builtin_return_address(0));
}

void announce_atomic(void* address, size_t bytes) {
  check_access(address, bytes, Use::kAtomic, __builtin_return_address(0));
}

void copy_async(void* to, const void* from, size_t bytes) {
  const void* const code = __builtin_return_address(0);
  const Pause pause;
  current->start_copy(to, from, bytes, code);
}

void commit_copies() { ++current->self().committed_groups; }

void wait_for_copies(int pending) {
  const Pause pause;
  current->finish_copies(pending);
}

}  // namespace emulator
