#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__APPLE__)
#define FUSEDREG_SYMBOL "_fusedreg_emulation_switch"
#else
#define FUSEDREG_SYMBOL "fusedreg_emulation_switch"
#endif

#if defined(__x86_64__)
// rdi: where to store the stack pointer left; rsi: the one to go on with.
asm(".text\n.p2align 4\n.globl " FUSEDREG_SYMBOL "\n" FUSEDREG_SYMBOL
    ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
static constexpr size_t kEntryWord = 6;   // what `ret` takes
static constexpr size_t kFrameWords = 8;  // and a word above, so that the entry finds the alignment a call leaves
#elif defined(__aarch64__)
asm(".text\n.p2align 4\n.globl " FUSEDREG_SYMBOL "\n" FUSEDREG_SYMBOL
    ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x2, sp\n  str x2, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
static constexpr size_t kEntryWord = 11;  // x30
static constexpr size_t kFrameWords = 20;
#else
#error "the emulation switches fibers on x86-64 and aarch64"
#endif

namespace fusedreg::cuda::emulation {

Stacks::~Stacks() {
  if (memory_ != nullptr) munmap(memory_, count_ * kBytes);
}

void Stacks::reserve(size_t count) {
  if (count <= count_) return;
  if (memory_ != nullptr) munmap(memory_, count_ * kBytes);
  memory_ = nullptr;
  count_ = 0;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
  flags |= MAP_NORESERVE;
#endif
  void* mapped = mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapped == MAP_FAILED) {
    throw std::runtime_error("CUDA emulation: no memory for the stacks of " + std::to_string(count) + " threads");
  }
#if defined(MADV_NOHUGEPAGE)
  madvise(mapped, count * kBytes, MADV_NOHUGEPAGE);  // a thread uses a page or two of its stack
#endif
  memory_ = static_cast<char*>(mapped);
  count_ = count;
  // A page below each stack faults where a thread overruns it. The number of mappings is limited, so only for some.
  const size_t guarded = 4096, page = 16 * 1024;
  for (size_t index = 0; index < count && index < guarded; ++index) mprotect(memory_ + index * kBytes, page, PROT_NONE);
}

void* Stacks::prepare(size_t index, void (*entry)()) {
  uintptr_t* const frame = reinterpret_cast<uintptr_t*>(memory_ + (index + 1) * kBytes) - kFrameWords;
  std::memset(frame, 0, kFrameWords * sizeof(uintptr_t));
  frame[kEntryWord] = reinterpret_cast<uintptr_t>(entry);
  return frame;
}

}  // namespace fusedreg::cuda::emulation
