// Picks the instruction set at run time.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace momentkv {

#if defined(__x86_64__)
namespace amx {
extern const Kernels table;
}
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

#if defined(__x86_64__)
// Linux gives a process the registers of AMX where it asks for them (Documentation/arch/x86/xstate.rst).
bool gets_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

bool works_here(const char* isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(isa, "avx512vnni") == 0) return vnni;
  const bool amx = vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
  if (std::strcmp(isa, "amx") == 0) return amx && gets_tiles();
#endif
  return std::strcmp(isa, "generic") == 0;
}

const Kernels& choose() {
  const Kernels* preferred[] = {
#if defined(__x86_64__)
      &amx::table, &avx512vnni::table, &avx512::table, &avx2::table,
#endif
      &generic::table};
  const char* wanted = std::getenv("MOMENTKV_CPU_ISA");
  for (const Kernels* kernels : preferred)
    if (wanted == nullptr ? works_here(kernels->name) : std::strcmp(wanted, kernels->name) == 0 && works_here(wanted))
      return *kernels;
  throw std::runtime_error("MOMENTKV_CPU_ISA=" + std::string(wanted) +
                           ": this machine or build does not have it; amx, avx512vnni, avx512, avx2 and generic are known; unset it to "
                           "let the kernels choose");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace momentkv
