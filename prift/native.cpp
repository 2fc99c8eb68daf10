// The products of the statistics and of the loss on a CPU, accumulated and stored in float32:
//
//     out [M, N]  =  or +=   a [M, K] times b [K, N]
//
// PyTorch has this product of bfloat16 operands on CUDA (torch.mm with out_dtype) and not on a CPU,
// where its result is rounded to bfloat16. The arithmetic is oneDNN's, through the matrix kernels
// that PyTorch exports; what stands here is only the cutting into blocks.

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <string>
#include <vector>

namespace {

// The first exception of a parallel region, which none may leave: thrown again behind it.
class Caught {
  std::exception_ptr first;

 public:
  template <class Work> void attempt(Work work) noexcept {
    try {
      work();
    } catch (...) {
#pragma omp critical(prift_caught)
      if (!first) first = std::current_exception();
    }
  }
  void rethrow() const {
    if (first) std::rethrow_exception(first);
  }
};

constexpr int64_t kRows = 128;  // of a block of a: its part stays in the second-level cache

// columns  of a strip of b
// depth    how many products are summed in one float32 chain. Longer chains lose digits, which
//          shows in float32 and vanishes under the rounding of bfloat16 operands.
// pair     neighbours in k that lie side by side in a word of a packed strip
template <class T> struct Block;
template <> struct Block<float> {
  static constexpr int64_t columns = 64, depth = 256, pair = 1;
};
template <> struct Block<at::BFloat16> {
  static constexpr int64_t columns = 48, depth = 1024, pair = 2;
};

template <class T> int64_t padded(int64_t depth) { return (depth + Block<T>::pair - 1) / Block<T>::pair * Block<T>::pair; }

// A strip of b, depth x count, as the kernel takes it; a missing half of a pair is zero. Element
// (k, n) of b stands at k * along_k + n * along_n.
template <class T>
void pack(const T* b, int64_t along_k, int64_t along_n, int64_t depth, int64_t count, T* packed) {
  constexpr int64_t pair = Block<T>::pair;
  if (pair == 2 && along_k == 1 && depth % 2 == 0) {  // pairs lie side by side already
    auto words = reinterpret_cast<uint32_t*>(packed);
    for (int64_t j = 0; j < count; j++) {
      auto source = reinterpret_cast<const uint32_t*>(b + j * along_n);
      for (int64_t i = 0; i < depth / 2; i++) words[i * count + j] = source[i];
    }
  } else if (pair == 1 && along_k == 1) {
    for (int64_t j = 0; j < count; j++)
      for (int64_t k = 0; k < depth; k++) packed[k * count + j] = b[j * along_n + k];
  } else {
    for (int64_t k = 0; k < depth; k += pair)
      for (int64_t j = 0; j < count; j++)
        for (int64_t i = 0; i < pair; i++)
          packed[k * count + j * pair + i] = k + i < depth ? b[(k + i) * along_k + j * along_n] : T(0);
  }
}

// oneDNN compiles and keeps a kernel for every size, so sizes that vary are filled up with zeros.
constexpr int64_t kStep = 32;

int64_t rounded(int64_t depth) { return (depth + kStep - 1) / kStep * kStep; }

// out = a b for a wide b: every strip is packed once and meets all rows of a, which has even rows.
template <class T>
void wide(int64_t M, int64_t N, int64_t K, const T* a, const T* b, bool b_turned, bool add, float* out) {
  constexpr int64_t columns = Block<T>::columns, longest = Block<T>::depth;
  const int64_t along_k = b_turned ? 1 : N, along_n = b_turned ? K : 1;
  Caught caught;
#pragma omp parallel
  {
    std::vector<T> packed;
#pragma omp for
    for (int64_t n = 0; n < N; n += columns)
      caught.attempt([&] {
        packed.resize(columns * padded<T>(std::min(K, longest)));
        const int64_t count = std::min(columns, N - n);
        for (int64_t k = 0; k < K; k += longest) {
          const int64_t depth = std::min(longest, K - k);
          pack(b + k * along_k + n * along_n, along_k, along_n, depth, count, packed.data());
          for (int64_t m = 0; m < M; m += kRows)
            at::native::cpublas::brgemm(std::min(kRows, M - m), count, depth, K, count, N, add || k > 0,
                                        a + m * K + k, packed.data(), out + m * N + n, Block<T>::pair == 2);
        }
      });
    caught.attempt([] { at::native::cpublas::brgemm_release(Block<T>::pair == 2); });
  }
  caught.rethrow();
}

// A block of a, [depth, rows] at a stride of M, as [rows, even] with zeros behind.
template <class T>
void turn(const T* a, int64_t M, int64_t rows, int64_t depth, int64_t even, T* turned) {
  constexpr int64_t square = 32;
  for (int64_t k = 0; k < depth; k += square)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = k; j < std::min(k + square, depth); j++) turned[i * even + j] = a[j * M + i];
  for (int64_t i = 0; i < rows; i++) std::fill_n(turned + i * even + depth, even - depth, T(0));
}

// out += a' b for a tall a', given as a [K, M]: every block of a is turned once and meets all of b.
template <class T>
void tall(int64_t M, int64_t N, int64_t K, const T* a, const T* b, float* out) {
  constexpr int64_t columns = Block<T>::columns, longest = Block<T>::depth;
  const int64_t strips = (N + columns - 1) / columns, room = rounded(std::min(K, longest));
  std::vector<T> packed(strips * columns * room);
  for (int64_t k = 0; k < K; k += longest) {
    const int64_t depth = std::min(longest, K - k), even = rounded(depth);
    for (int64_t s = 0; s < strips; s++) {
      const int64_t count = std::min(columns, N - s * columns);
      T* strip = packed.data() + s * columns * room;
      pack(b + k * N + s * columns, N, int64_t(1), depth, count, strip);
      std::fill(strip + padded<T>(depth) * count, strip + even * count, T(0));
    }
    Caught caught;
#pragma omp parallel
    {
      std::vector<T> turned;
#pragma omp for
      for (int64_t m = 0; m < M; m += kRows)
        caught.attempt([&] {
          turned.resize(kRows * room);
          const int64_t rows = std::min(kRows, M - m);
          turn(a + k * M + m, M, rows, depth, even, turned.data());
          for (int64_t s = 0; s < strips; s++) {
            const int64_t count = std::min(columns, N - s * columns);
            at::native::cpublas::brgemm(rows, count, even, even, count, N, true, turned.data(),
                                        packed.data() + s * columns * room, out + m * N + s * columns,
                                        Block<T>::pair == 2);
          }
        });
      caught.attempt([] { at::native::cpublas::brgemm_release(Block<T>::pair == 2); });
    }
    caught.rethrow();
  }
}

template <class T>
int supported() {
  T a[4] = {}, b[4] = {};
  float c[1];
  try {
    at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, a, b, c, Block<T>::pair == 2);
    at::native::cpublas::brgemm_release(Block<T>::pair == 2);
    return 1;
  } catch (...) {  // this processor has no such instructions
    return 0;
  }
}

thread_local std::string message;

// 0; 1 where memory was refused; 2 for any other exception, with `message` set. None may reach C.
template <class Work>
int answer(Work work) noexcept {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  } catch (const std::exception& error) {
    try {
      message = error.what();
    } catch (...) {
      return 1;
    }
  } catch (...) {
    message.clear();
  }
  return 2;
}

}  // namespace

// All tensors contiguous; `half` says bfloat16, for which K is even in prift_wide.
extern "C" {

int prift_supported(int half) { return half ? supported<at::BFloat16>() : supported<float>(); }

const char* prift_message() { return message.c_str(); }

int prift_wide(int half, int64_t M, int64_t N, int64_t K, const void* a, const void* b, int b_turned, int add,
               float* out) {
  return answer([&] {
    if (half)
      wide(M, N, K, static_cast<const at::BFloat16*>(a), static_cast<const at::BFloat16*>(b), b_turned, add, out);
    else
      wide(M, N, K, static_cast<const float*>(a), static_cast<const float*>(b), b_turned, add, out);
  });
}

int prift_tall(int half, int64_t M, int64_t N, int64_t K, const void* a, const void* b, float* out) {
  return answer([&] {
    if (half)
      tall(M, N, K, static_cast<const at::BFloat16*>(a), static_cast<const at::BFloat16*>(b), out);
    else
      tall(M, N, K, static_cast<const float*>(a), static_cast<const float*>(b), out);
  });
}

}
