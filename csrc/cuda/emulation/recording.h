// What a call does to device memory, done and kept to be done again: as a CUDA graph replays what was captured. A
// result that is right after the arguments have changed in place shows that nothing launched depends on a value of
// theirs.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace fusedreg::cuda::emulation {

// Does `work`; while recording it is kept too. One thread records at a time, and no other calls meanwhile.
void perform(std::function<void()> work);
// While recording: memory of the call's own, which lives as long as the record.
void keep_alive(std::shared_ptr<void> memory);

void start_recording();  // forgets what was recorded before
size_t replay();         // ends the recording and does all of it again; how much that was
void forget_recording();

}  // namespace fusedreg::cuda::emulation
