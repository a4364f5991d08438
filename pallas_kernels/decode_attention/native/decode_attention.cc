// Attention of a few queries over slots, on CPU: arrays and packed codes are read once, a few slots at a time.
//
// An XLA FFI handler. What it computes is defined by pallas_kernels/decode_attention/reference.py. Slots of every row
// and KV head are cut into pieces of a fixed size, which threads share: results do not depend on how many there are.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace kvjax {

constexpr int64_t kPiece = 1024;  // slots that a thread attends to at a time
constexpr int64_t kTile = 32;     // slots that are decoded at a time: 8 KB at 64 channels
constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum class Code { kFloat32, kBfloat16, kBits8, kBits4, kBits2 };

struct BFloat16 {
  uint16_t bits;
};

inline float ToFloat(float x) { return x; }
inline __attribute__((always_inline)) float ToFloat(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float found;
  __builtin_memcpy(&found, &wide, sizeof found);
  return found;
}

// Keys or values [B, K or 1, S, H], as they are stored.
struct Stored {
  const void* data;
  const void* affine;  // scales and zeros of codes
  Code code;
  bool per_token;    // scales are of a token's channels, not of a channel's tokens
  bool wide_affine;  // float32, not bfloat16
  int64_t heads, slots, channels, group;

  int64_t Row(int64_t b, int64_t head) const { return b * heads + (heads == 1 ? 0 : head); }
};

// A number for each slot, [B, K or 1, S], or nothing.
struct PerSlot {
  const void* data = nullptr;
  int64_t heads = 1, slots = 0;

  template <typename T>
  const T* At(int64_t b, int64_t head) const {
    return static_cast<const T*>(data) + (b * heads + (heads == 1 ? 0 : head)) * slots;
  }
};

struct Problem {
  const float* q;        // [B, T, N, H]
  const int32_t* q_pos;  // [B, T]
  Stored k, v;
  PerSlot pos, bias, k_gain, v_gain;
  int64_t batch, tokens, query_heads, kv_heads, slots;
  int64_t group, rows;  // query heads of a KV head; times tokens
  int64_t widest;       // channels of keys or of values
  int64_t window;       // 0: all
  float scale;

  int64_t QueryAt(int64_t b, int64_t head, int64_t row) const {
    return (b * tokens + row / group) * query_heads + head * group + row % group;
  }
  const float* Query(int64_t b, int64_t head, int64_t row) const { return q + QueryAt(b, head, row) * k.channels; }
};

namespace portable {
#include "attend.inc"
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KVJAX_X86_VERSIONS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "attend.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512")
namespace avx512 {
#include "attend.inc"
}
#pragma GCC pop_options
#endif

using AttendFunction = decltype(&portable::Attend);

// The version for this machine, or the one that is asked for by name.
AttendFunction Choose(const std::string& name) {
#ifdef KVJAX_X86_VERSIONS
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && (name.empty() || name == "avx512")) return &avx512::Attend;
  if (has_avx2 && (name.empty() || name == "avx2")) return &avx2::Attend;
#endif
  return name.empty() || name == "portable" ? &portable::Attend : nullptr;
}

// Runs `work(i)` for i in [0, count) on the caller and on whatever other threads take part; no thread waits for one
// that has not begun.
template <typename Work>
void ForEach(ffi::ThreadPool& pool, int64_t count, Work work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto run = [state, count, work] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      work(i);
      state->done.fetch_add(1);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(run)(run));
  run();
  while (state->done.load() < count) std::this_thread::yield();
}

ffi::Error DecodeAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::S32> q_pos,
                           ffi::Buffer<ffi::S32> k_pos, ffi::AnyBuffer k, ffi::AnyBuffer k_affine, ffi::AnyBuffer v,
                           ffi::AnyBuffer v_affine, ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> k_gain,
                           ffi::Buffer<ffi::F32> v_gain, ffi::ResultBuffer<ffi::F32> out,
                           ffi::ResultBuffer<ffi::F32> lse, int64_t kv_heads, int64_t k_bits, int64_t k_group,
                           bool k_per_token, int64_t v_bits, int64_t v_group, bool v_per_token, int64_t window,
                           float scale, std::string_view version) {
  const AttendFunction attend = Choose(std::string(version));
  if (attend == nullptr)
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "this machine has no version " + std::string(version));
  const auto shape = q.dimensions();
  Problem p;
  p.q = q.typed_data();
  p.q_pos = q_pos.typed_data();
  p.batch = shape[0], p.tokens = shape[1], p.query_heads = shape[2];
  p.kv_heads = kv_heads, p.group = shape[2] / kv_heads, p.rows = p.tokens * p.group;
  p.slots = k_pos.dimensions()[2];
  p.window = window, p.scale = scale;

  auto stored = [&](ffi::AnyBuffer& x, ffi::AnyBuffer& affine, int64_t bits, int64_t group, bool per_token,
                    int64_t channels) {
    Code code = bits == 8 ? Code::kBits8 : bits == 4 ? Code::kBits4 : Code::kBits2;
    if (bits == 0) code = x.element_type() == ffi::F32 ? Code::kFloat32 : Code::kBfloat16;
    return Stored{x.untyped_data(), affine.untyped_data(), code,    per_token, affine.element_type() == ffi::F32,
                  x.dimensions()[1], p.slots, channels, group};
  };
  p.k = stored(k, k_affine, k_bits, k_group, k_per_token, shape[3]);
  p.v = stored(v, v_affine, v_bits, v_group, v_per_token, out->dimensions()[3]);
  p.widest = std::max(p.k.channels, p.v.channels);
  auto per_slot = [&](const auto& x) {
    return x.dimensions()[2] ? PerSlot{x.typed_data(), x.dimensions()[1], p.slots} : PerSlot{};
  };
  p.pos = PerSlot{k_pos.typed_data(), k_pos.dimensions()[1], p.slots};
  p.bias = per_slot(bias), p.k_gain = per_slot(k_gain), p.v_gain = per_slot(v_gain);

  const int64_t pieces = (p.slots + kPiece - 1) / kPiece, width = p.v.channels, heads = p.batch * kv_heads;
  std::vector<float> sums(heads * pieces * p.rows * width);
  std::vector<float> most(heads * pieces * p.rows), total(most.size());
  float* found[] = {sums.data(), most.data(), total.data()};
  ForEach(pool, heads * pieces, [&p, attend, found, pieces, width, kv_heads](int64_t i) {
    const int64_t head = i / pieces, first = i % pieces * kPiece;
    std::vector<float> scratch(p.rows * kPiece + (kTile + 2) * p.widest);
    attend(p, head / kv_heads, head % kv_heads, first, std::min(first + kPiece, p.slots), scratch.data(),
           found[0] + i * p.rows * width, found[1] + i * p.rows, found[2] + i * p.rows);
  });

  float *to = out->typed_data(), *to_lse = lse->typed_data();
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t r = 0; r < p.rows; ++r) {
      const int64_t query = p.QueryAt(head / kv_heads, head % kv_heads, r);
      float highest = -kInfinity, sum = 0.0f;
      for (int64_t i = 0; i < pieces; ++i) highest = std::max(highest, most[(head * pieces + i) * p.rows + r]);
      float* row = to + query * width;
      for (int64_t h = 0; h < width; ++h) row[h] = 0.0f;
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t at = (head * pieces + i) * p.rows + r;
        if (most[at] == -kInfinity) continue;
        const float factor = std::exp(most[at] - highest);
        sum += factor * total[at];
        for (int64_t h = 0; h < width; ++h) row[h] += factor * sums[at * width + h];
      }
      for (int64_t h = 0; h < width; ++h) row[h] /= sum == 0.0f ? 1.0f : sum;
      to_lse[query] = sum == 0.0f ? -kInfinity : highest + std::log(sum);
    }
  }
  return ffi::Error::Success();
}

}  // namespace kvjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(KvjaxDecodeAttention, kvjax::DecodeAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("kv_heads")
                                  .Attr<int64_t>("k_bits")
                                  .Attr<int64_t>("k_group")
                                  .Attr<bool>("k_per_token")
                                  .Attr<int64_t>("v_bits")
                                  .Attr<int64_t>("v_group")
                                  .Attr<bool>("v_per_token")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<std::string_view>("version"));
