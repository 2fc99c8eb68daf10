// hidden [M, K] times weight [N, K] transposed, accumulated and stored in float32.
//
// PyTorch has this product of bfloat16 operands on CUDA (torch.mm with out_dtype) and not on a CPU,
// where its result is rounded to bfloat16. The arithmetic is oneDNN's, through the matrix kernels
// that PyTorch exports; what stands here is only the cutting into blocks.

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kRows = 128;     // of hidden per block: its part stays in the second-level cache

// depth: how many products are summed in one float32 chain. Longer chains lose digits, which shows
// in float32 and vanishes under the rounding of bfloat16 operands.
template <class T> struct Operand;
template <> struct Operand<float> {
  static constexpr int64_t pair = 1, columns = 64, depth = 256;
  using Word = float;
};
template <> struct Operand<at::BFloat16> {  // two neighbours in k lie side by side in a word
  static constexpr int64_t pair = 2, columns = 48, depth = 1024;
  using Word = uint32_t;
};

// Columns n..n+count of the product, depth k..k+depth: the weight is transposed into `packed`.
template <class T>
void pack(const T* weight, int64_t K, int64_t count, int64_t depth, typename Operand<T>::Word* packed) {
  for (int64_t j = 0; j < count; j++) {
    auto source = reinterpret_cast<const typename Operand<T>::Word*>(weight + j * K);
    for (int64_t i = 0; i < depth / Operand<T>::pair; i++) packed[i * count + j] = source[i];
  }
}

template <class T>
void multiply(int64_t M, int64_t N, int64_t K, const T* hidden, const T* weight, float* out) {
  constexpr int64_t columns = Operand<T>::columns, longest = Operand<T>::depth;
  constexpr bool paired = Operand<T>::pair == 2;
#pragma omp parallel
  {
    std::vector<typename Operand<T>::Word> packed(columns * std::min(K, longest));
#pragma omp for
    for (int64_t n = 0; n < N; n += columns) {
      const int64_t count = std::min(columns, N - n);
      for (int64_t k = 0; k < K; k += longest) {
        const int64_t depth = std::min(longest, K - k);
        pack(weight + n * K + k, K, count, depth, packed.data());
        for (int64_t m = 0; m < M; m += kRows)
          at::native::cpublas::brgemm(
              std::min(kRows, M - m), count, depth, K, count, N, /*add_C=*/k > 0,
              hidden + m * K + k, reinterpret_cast<const T*>(packed.data()), out + m * N + n, paired);
      }
    }
    at::native::cpublas::brgemm_release(paired);
  }
}

template <class T>
int supported() {
  T a[4] = {}, b[4] = {};
  float c[1];
  try {
    at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, a, b, c, Operand<T>::pair == 2);
    at::native::cpublas::brgemm_release(Operand<T>::pair == 2);
    return 1;
  } catch (...) {  // this processor has no such instructions
    return 0;
  }
}

}  // namespace

extern "C" {

int prift_supported(int half) { return half ? supported<at::BFloat16>() : supported<float>(); }

// All tensors contiguous; with half, K is even.
void prift_project(int half, int64_t M, int64_t N, int64_t K, const void* hidden, const void* weight, float* out) {
  if (half)
    multiply(M, N, K, static_cast<const at::BFloat16*>(hidden), static_cast<const at::BFloat16*>(weight), out);
  else
    multiply(M, N, K, static_cast<const float*>(hidden), static_cast<const float*>(weight), out);
}

}
