// Picks the instruction set at run time.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace momentkv {

#if defined(__x86_64__)
namespace avx512vnni {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace generic {
extern const Kernels table;
}

namespace {

bool works_here(const char* isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  if (std::strcmp(isa, "avx512vnni") == 0) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
  return std::strcmp(isa, "generic") == 0;
}

const Kernels& choose() {
  const Kernels* preferred[] = {
#if defined(__x86_64__)
      &avx512vnni::table, &avx512::table, &avx2::table,
#endif
      &generic::table};
  const char* wanted = std::getenv("MOMENTKV_CPU_ISA");
  for (const Kernels* kernels : preferred)
    if (wanted == nullptr ? works_here(kernels->name) : std::strcmp(wanted, kernels->name) == 0 && works_here(wanted))
      return *kernels;
  throw std::runtime_error("MOMENTKV_CPU_ISA=" + std::string(wanted) +
                           ": this machine or build does not have it; avx512vnni, avx512, avx2 and generic are known; unset it to "
                           "let the kernels choose");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace momentkv
