// Torch's memory on the CPU, from malloc instead of posix_memalign. No operator: the one source that knows torch.
//
// In glibc a hole that a freed aligned block leaves is too small for the next one of the same size, because room to
// align is looked for again. So the activations of every step go elsewhere than those of the step before, and the
// process holds a third more than it uses. Here that room is part of the block, and a block of the same size fits.

#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <new>

#include "common.h"

namespace {

const uintptr_t ALIGNMENT = 64;  // c10::gAlignment

// Blocks know where malloc's begin: it stands in the word before their first.
void release(void* block) {
    if (!block) return;
    c10::profiledCPUMemoryReporter().Delete(block);
    std::free(static_cast<void**>(block)[-1]);
}

struct Malloc final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        if (!size) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
        void* from = std::malloc(size + ALIGNMENT + sizeof(void*));
        if (!from) throw std::bad_alloc();
        const uintptr_t first = reinterpret_cast<uintptr_t>(from) + sizeof(void*);
        void** block = reinterpret_cast<void**>((first + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
        block[-1] = from;
        c10::profiledCPUMemoryReporter().New(block, size);
        return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};

const uint8_t PRIORITY = 100;  // over other allocators

}  // namespace

// From now on, until the process ends. What torch allocated before is freed as it was allocated.
extern "C" void use_malloc() { c10::SetCPUAllocator(new Malloc, PRIORITY); }
