#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace ddim {
namespace {

class Pool {
 public:
  void run(int parts, const std::function<void(int)>& part) {
    std::unique_lock<std::mutex> only_caller(caller_, std::try_to_lock);
    const int shared = only_caller ? share(parts, part) : 1;
    part(0);
    for (int i = shared; i < parts; ++i) part(i);
    if (!only_caller) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  // Gives parts 1, 2, ... to a worker each, and returns the first that has none: the number of
  // threads may be limited.
  int share(int parts, const std::function<void(int)>& part) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (; workers_ < parts - 1; ++workers_) std::thread(&Pool::work, this, workers_ + 1).detach();
    } catch (const std::exception&) {
    }
    part_ = &part;
    parts_ = std::min(parts, workers_ + 1);
    pending_ = parts_ - 1;
    ++generation_;
    start_.notify_all();
    return parts_;
  }

  void work(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= parts_) continue;
      const auto* part = part_;
      lock.unlock();
      (*part)(index);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_, mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int)>* part_ = nullptr;
  int parts_ = 0, pending_ = 0, workers_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: its threads outlive static destructors. A forked child has none of them, so it
// starts with a new pool. Null where there is not enough memory for one.
Pool* pool = nullptr;
std::once_flag pool_once;

void make_pool() { pool = new (std::nothrow) Pool; }

Pool* the_pool() {
  std::call_once(pool_once, [] {
    if (pthread_atfork(nullptr, nullptr, make_pool) == 0) make_pool();
  });
  return pool;
}

}  // namespace

void parallel_for(int64_t n, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& work) {
  const int64_t grains = (n + grain - 1) / grain;
  const int parts = static_cast<int>(std::min<int64_t>(std::max(threads, 1), grains));
  Pool* pool = parts > 1 ? the_pool() : nullptr;
  if (!pool) {
    if (n > 0) work(0, n);
    return;
  }
  pool->run(parts, [&](int i) {
    const int64_t begin = grains * i / parts * grain, end = std::min(n, grains * (i + 1) / parts * grain);
    work(begin, end);
  });
}

}  // namespace ddim
