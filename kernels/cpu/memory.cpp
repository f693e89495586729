// Torch's memory on the CPU, from malloc instead of posix_memalign. No operator: the one source that knows torch.
//
// In glibc a hole that a freed aligned block leaves is too small for the next one of the same size, because room to
// align is looked for again. So the activations of every step go elsewhere than those of the step before, and the
// process holds a third more than it uses. Here that room is part of the block, and a block of the same size fits.

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "common.h"

namespace {

const uintptr_t ALIGNMENT = 64;  // c10::gAlignment

// From this size on malloc maps a block for itself and unmaps it when it is freed (engine/memory.py). The system then
// has to find and clear its pages again at the next use, in which GPT-2 spent a fifth of a step of full fine-tuning.
const size_t LARGE = size_t{1} << 25;

// What malloc gave: where it begins, how long it is, and how much of it was asked for.
struct Block {
    void* from;
    size_t size;
    size_t asked;
};

// So large blocks are kept, for the next that fit into them. Those in use and those kept are together no more than what
// was asked for at once before: the process does not grow by it.
class LargeBlocks {
   public:
    Block take(size_t size) {
        const std::lock_guard<std::mutex> guard(lock);
        asked += size;
        most = std::max(most, asked);
        auto best = kept.end();
        for (auto it = kept.begin(); it != kept.end(); ++it) {
            const bool fits = it->size >= size && it->size - size <= size / 2 && used + it->size <= most;
            if (fits && (best == kept.end() || it->size < best->size)) best = it;
        }
        if (best != kept.end()) {
            const Block block = {best->from, best->size, size};
            kept.erase(best);
            used += block.size;
            unused -= block.size;
            return block;
        }
        used += size;
        free_oldest(most);
        void* from = std::malloc(size);
        if (!from) {
            free_oldest(0);
            from = std::malloc(size);
        }
        if (!from) {
            used -= size;
            asked -= size;
        }
        return {from, size, size};
    }

    void give_back(Block block) {
        const std::lock_guard<std::mutex> guard(lock);
        asked -= block.asked;
        used -= block.size;
        unused += block.size;
        kept.push_back(block);
        free_oldest(most);
    }

   private:
    // Frees those that have been kept longest, until all blocks together have `limit` bytes.
    void free_oldest(size_t limit) {
        while (!kept.empty() && used + unused > limit) {
            std::free(kept.front().from);
            unused -= kept.front().size;
            kept.erase(kept.begin());
        }
    }

    std::mutex lock;
    std::vector<Block> kept;      // the one kept longest first
    size_t used = 0, unused = 0;  // bytes of blocks in use, of blocks kept
    size_t asked = 0, most = 0;   // bytes asked for that are in use, and most of them at once so far
};

LargeBlocks& large_blocks() {
    static LargeBlocks* blocks = new LargeBlocks;  // never destroyed: tensors may be freed while the process ends
    return *blocks;
}

// Blocks know what malloc gave for them: it stands in front of them.
void release(void* block) {
    if (!block) return;
    c10::profiledCPUMemoryReporter().Delete(block);
    const Block given = static_cast<Block*>(block)[-1];
    if (given.size < LARGE) {
        std::free(given.from);
    } else {
        large_blocks().give_back(given);
    }
}

struct Malloc final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        if (!size) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
        const size_t whole = size + ALIGNMENT + sizeof(Block);
        const Block given = whole < LARGE ? Block{std::malloc(whole), whole, whole} : large_blocks().take(whole);
        if (!given.from) throw std::bad_alloc();
        const uintptr_t first = reinterpret_cast<uintptr_t>(given.from) + sizeof(Block);
        Block* block = reinterpret_cast<Block*>((first + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
        block[-1] = given;
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
