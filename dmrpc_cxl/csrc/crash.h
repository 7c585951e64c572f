/*
 * crash.h - crash points: a label behind every step that changes what other processes can see.
 *
 * At each of them a process can be made to kill itself, at the n-th time it passes there: so a campaign can end a
 * process of any role inside of any operation, and say exactly where (tests/crash). Always compiled in: off, a point is
 * one branch on a global that is never taken. -DDM_NO_CRASH_POINTS leaves them out.
 *
 *     DM_CRASH_POINT=label[:n]        read at attach and when a device is opened; n is 1 if it is left out; "none" only
 *                                     counts
 *     DM_CRASH_RECORD=path            a file of DM_CRASH_RECORD_BYTES, which counts passes and deaths by label
 *
 * A label says what has just been done. Steps of Python have theirs here, too: dmrpc_cxl._native.crash_point("name").
 * Those of loops over pages are passed once for each page.
 *
 * What is a step: one store to a frame word, a page-table entry, the state or the chain of a Ref, the operation and the
 * progress of an intent record, the progress of recovery, the state of a host or a service, the coordinator in the
 * superblock. tests/c/test_crash_points.c watches the stores of every operation, and fails if two of these have no label
 * between them. All else that is written (a Ref's other fields, an intent's, counters) counts only once one of these
 * stores says so.
 */
#ifndef DM_CRASH_H
#define DM_CRASH_H

#include <stdbool.h>
#include <stdint.h>

#define DM_CRASH_LABELS(X)                                                                         \
    /* frame words and page tables, in any operation */                                            \
    X(frame_in_use, "the word of a free frame says in use")                                        \
    X(frame_left_use, "the word of a frame of an exclusive run says free")                         \
    X(frame_counted_down, "a count was dropped")                                                   \
    X(frame_overcounted, "a count above the most was taken, and is given back next")               \
    X(pte_set, "an entry of the page table shows a frame")                                         \
    X(pte_hole, "an entry of the page table is a hole")                                            \
    X(pte_cleared, "an entry of an exclusive or moved range is empty")                             \
    X(pte_uncounted, "an entry is empty whose count is dropped next")                              \
    /* ralloc, rfree */                                                                            \
    X(alloc_begun, "intent written, frames still free")                                            \
    X(alloc_ended, "frames counted and mapped, intent gone")                                       \
    X(scatter_begun, "the same, for a piece of a scattered allocation")                            \
    X(scatter_shown, "the piece is shown, its entries are not set")                                \
    X(scatter_ended, "the piece is mapped")                                                        \
    X(free_begun, "intent to free an exclusive run written")                                       \
    X(free_ended, "exclusive run free, intent gone")                                               \
    /* Ref entries */                                                                              \
    X(slot_taken, "an entry is being built")                                                       \
    X(overflow_linked, "an overflow frame is linked, not counted")                                 \
    X(overflow_counted, "an overflow frame is counted")                                            \
    X(runs_stored, "the runs are in the entry")                                                    \
    X(ref_filled, "the entry is complete, not live")                                               \
    X(ref_published, "the entry is live")                                                          \
    X(overflow_unlinked, "an overflow frame is unlinked, its count not dropped")                   \
    X(ref_freed, "the entry is free")                                                              \
    /* create_ref */                                                                               \
    X(share_protected, "pages are protected, nothing is counted")                                  \
    X(share_begun, "intent to share written")                                                      \
    X(share_counted, "a page is counted for the Ref, progress not written")                        \
    X(share_progress, "and progress written")                                                      \
    X(share_undoing, "progress goes back, a count too many stands")                                \
    X(share_undone, "nothing is counted any more, intent gone, the entry being built")             \
    X(share_ended, "Ref live, intent gone")                                                        \
    X(move_begun, "intent to move written")                                                        \
    X(move_passed, "Ref live, the mapping's entries still there")                                  \
    X(move_ended, "the mapping's entries are gone, intent gone")                                   \
    /* accept, clone, drop */                                                                      \
    X(ref_accepted, "this host is the holder")                                                     \
    X(clone_claimed, "the source is being cloned")                                                 \
    X(clone_begun, "intent to clone written")                                                      \
    X(clone_counted, "a frame is counted for the clone, progress not written")                     \
    X(clone_progress, "and progress written")                                                      \
    X(clone_undoing, "progress goes back, a count too many stands")                                \
    X(clone_ended, "clone live, intent gone, source still claimed")                                \
    X(clone_released, "source live again")                                                         \
    X(drop_claimed, "the Ref is being dropped")                                                    \
    X(drop_begun, "intent to drop written")                                                        \
    X(drop_progress, "progress written, the count still there")                                    \
    X(drop_run_done, "all counts of a run are dropped")                                            \
    X(drop_ended, "entry free, intent gone")                                                       \
    /* map_ref, view_ref */                                                                        \
    X(map_claimed, "the Ref is being mapped")                                                      \
    X(map_put_back, "mapping failed, the Ref is live again")                                       \
    X(map_placed, "its pages are ready, the entries not set")                                      \
    X(map_begun, "intent to map written")                                                          \
    X(map_shown, "entries set, counts still the Ref's")                                            \
    X(map_passed, "counts are the mapping's, the entry is not free")                               \
    X(map_ended, "entry free, intent gone")                                                        \
    X(map_copied, "eager copy made, the Ref still claimed")                                        \
    X(map_dropping, "eager copy made, the Ref claimed to be dropped")                              \
    X(view_shown, "a view holds its Ref")                                                          \
    X(view_claimed, "the view's Ref is claimed to become a mapping")                               \
    X(view_dropping, "the view's Ref is claimed to be dropped")                                    \
    X(view_moved, "the view's Ref was handed on")                                                  \
    /* faults */                                                                                   \
    X(cow_begun, "intent to copy written")                                                         \
    X(cow_copied, "new frames in use and filled")                                                  \
    X(cow_shown, "the kernel shows the new frames, the page table the old")                        \
    X(cow_noted, "the old frame of a page is noted")                                               \
    X(cow_repointed, "a page's entry names its new frame, progress not written")                   \
    X(cow_progress, "and progress written, the old frame's count still there")                     \
    X(cow_ended, "pages copied, intent gone")                                                      \
    X(fill_begun, "intent to fill holes written")                                                  \
    X(fill_zeroed, "new frames in use and zeroed")                                                 \
    X(fill_shown, "the kernel shows them, the page table has holes")                               \
    X(fill_ended, "holes filled, intent gone")                                                     \
    /* frames from and to the coordinator; coming and going */                                     \
    X(grant_wanted, "frames are about to be asked for")                                            \
    X(grant_received, "frames were granted, and are not on the free list")                         \
    X(home_begun, "intent to hand a free run to its home written")                                 \
    X(home_sent, "the word of a free frame says that it is coming home")                           \
    X(home_found_gone, "words are stored, and home is not there")                                  \
    X(home_taken_back, "the word of such a frame names this host again")                           \
    X(home_hinted, "home can see where to look")                                                   \
    X(home_ended, "the run is home's, intent gone")                                                \
    X(home_taken_in, "home has taken a frame in, which is on no list")                             \
    X(return_worded, "the word of a free frame names the pool")                                    \
    X(return_untold, "words name the pool, the coordinator was not told")                          \
    X(return_told, "the coordinator has counted the frames")                                       \
    X(attach_registered, "host entry active, nothing else set up")                                 \
    X(attach_guarded, "the coordinator keeps the userfaultfd")                                     \
    X(detach_unmapped, "mappings freed, Refs still held")                                          \
    X(detach_dropping, "a Ref is claimed to be dropped at detach")                                 \
    X(detach_returned, "nothing is held any more, still registered")                               \
    X(detach_left, "the coordinator has freed the entry")                                          \
    /* rings */                                                                                    \
    X(ring_written, "a frame or a part of it is in the ring, the other does not know")             \
    X(ring_published, "the other can see it")                                                      \
    X(ring_copied, "bytes were taken from a ring, their room not given back")                      \
    X(ring_consumed, "the room was given back")                                                    \
    /* forwarding */                                                                               \
    X(relay_noted, "a call is noted, not forwarded")                                               \
    X(relay_sent, "a call was forwarded")                                                          \
    X(relay_answered, "a reply has come, and is not passed on")                                    \
    X(relay_replied, "a reply was passed on")                                                      \
    X(relay_ended, "a peer is gone, its calls are cancelled or answered")                          \
    /* the coordinator: native steps */                                                            \
    X(transfer_worded, "the word of a free frame names its new owner")                             \
    X(epoch_begun, "no coordinator is in the superblock")                                          \
    X(epoch_raised, "the epoch is a new one")                                                      \
    X(epoch_entered, "the new coordinator is in the superblock")                                   \
    X(epoch_left, "a coordinator that stops is out of the superblock")                             \
    X(host_cleared, "the page table of a new host is empty")                                       \
    X(host_entered, "a host is entered, not active")                                               \
    X(host_active, "a host is active")                                                             \
    X(host_state_set, "a host is declared dead, or its entry free")                                \
    X(service_written, "a service is in the table, not live")                                      \
    X(service_live, "a service is live")                                                           \
    X(service_withdrawn, "a service is gone")                                                      \
    X(scrub_taken_off, "counts that nobody holds were taken off")                                  \
    X(scrub_reclaimed, "a free frame of a host that is not attached is the pool's")                \
    X(scrub_ref_claimed, "a Ref that nobody holds is claimed to be freed")                         \
    X(scrub_ref_unlinked, "its overflow frames are forgotten")                                     \
    X(scrub_ref_freed, "its entry is free")                                                        \
    /* reclaiming a dead host */                                                                   \
    X(recover_begun, "what it was doing is noted")                                                 \
    X(recover_progress, "progress is written, the count still there")                              \
    X(recover_counted_down, "a count was dropped")                                                 \
    X(recover_reclaimed, "a frame that it owned is the pool's")                                    \
    X(recover_told_home, "the home of frames that it was handing over can see where to look")      \
    X(recover_drop_begun, "it is written which Ref is being dropped")                              \
    X(recover_claimed, "a Ref that it held is claimed to be dropped")                              \
    X(recover_unlinked, "an overflow frame is unlinked, its count not dropped")                    \
    X(recover_ref_freed, "a Ref entry is free")                                                    \
    X(recover_drop_ended, "a Ref is dropped, and no other one begun")                              \
    X(recover_op_settled, "the intent is gone")                                                    \
    X(recover_pte_undone, "an entry of an interrupted operation is empty")                         \
    X(recover_pte_cleared, "an entry of its page table is empty, its count dropped next")          \
    X(recover_intent_done, "its intent is settled")                                                \
    X(recover_refs_done, "its Refs are dropped")                                                   \
    X(recover_pages_done, "its pages are unmapped")                                                \
    X(recover_ended, "nothing is left of it")                                                      \
    /* the coordinator: steps in Python */                                                         \
    X(listener_bound, "a coordinator listens at its socket, and is not in the superblock")         \
    X(grant_unanswered, "frames are the host's, the answer is not sent")                           \
    X(return_counted, "returned frames are in the pool, the answer is not sent")                   \
    X(register_unanswered, "a host is admitted, the answer is not sent")                           \
    X(guard_kept, "a host's userfaultfd is kept, the answer is not sent")                          \
    X(host_declared_dead, "a host is dead, nothing of it is reclaimed")                            \
    X(host_reclaimed, "a host is reclaimed, its entry not free")                                   \
    X(host_forgotten, "the entry of a host is free")                                               \
    X(published, "a service is published, the answer is not sent")                                 \
    X(withdrawn, "a service is withdrawn, the answer is not sent")                                 \
    X(restored, "a new coordinator knows all hosts, and does not serve")                           \
    /* calls: where a Ref changes hands */                                                         \
    X(welcome_sent, "a client is told of its connection, which is not open here")                  \
    X(value_placed, "a Ref stands in a message that is being written")                             \
    X(call_written, "Refs of the arguments made, the call is not sent")                            \
    X(call_sent, "a call with Refs is sent")                                                       \
    X(call_admitted, "a call with Refs is read, none of them taken")                               \
    X(value_viewed, "a Ref of a message is shown here")                                            \
    X(value_accepted, "a Ref of a message is held here")                                           \
    X(method_returned, "a method with Refs has returned, its reply is not written")                \
    X(reply_written, "Refs of the reply made, and not remembered")                                 \
    X(reply_remembered, "Refs of the reply remembered, it is not sent")                            \
    X(reply_sent, "a reply with Refs is sent")                                                     \
    X(reply_discarded, "Refs of a reply that nobody wants were dropped")                           \
    X(reply_read, "a reply with Refs is read")                                                     \
    X(refs_taken_back, "Refs that nobody took were dropped")

enum dm_crash_label {
    DM_CRASH_none,
#define DM_CRASH_ENUM(name, text) DM_CRASH_##name,
    DM_CRASH_LABELS(DM_CRASH_ENUM)
#undef DM_CRASH_ENUM
        DM_CRASH_NR
};

/* Shared by all processes of a campaign. */
#define DM_CRASH_SLOTS 256u
struct dm_crash_record {
    uint64_t passes[DM_CRASH_SLOTS];
    uint64_t deaths[DM_CRASH_SLOTS];
};
#define DM_CRASH_RECORD_BYTES sizeof(struct dm_crash_record)
_Static_assert(DM_CRASH_NR <= DM_CRASH_SLOTS, "labels fit");

struct dm_crash_info {
    const char *name, *text;
};
extern const struct dm_crash_info dm_crash_labels[DM_CRASH_NR];

extern bool dm_crash_armed __attribute__((visibility("hidden")));

#ifdef DM_NO_CRASH_POINTS
#define DM_CRASH_IS_ARMED false
#else
#define DM_CRASH_IS_ARMED __builtin_expect(dm_crash_armed, 0)
#endif
/*
 * A call that is never made makes the code around it slower all the same: what lives across it has to be kept in registers
 * that calls preserve. So this one preserves all, where we know how. 128: the red zone, where leaf functions keep things.
 */
#if defined(__x86_64__)
#define DM_CRASH_CALL(label)                                                                       \
    __asm__ volatile("leaq -128(%%rsp), %%rsp\n\t"                                                 \
                     "pushq %0\n\t"                                                                \
                     "call dm_crash_pass_preserving\n\t"                                           \
                     "leaq 136(%%rsp), %%rsp"                                                      \
                     :                                                                             \
                     : "i"((long)(label))                                                          \
                     : "memory", "cc")
#else
#define DM_CRASH_CALL(label) dm_crash_pass(label)
#endif
#define DM_CRASH_POINT(label)                                                                      \
    do {                                                                                           \
        if (DM_CRASH_IS_ARMED)                                                                     \
            DM_CRASH_CALL(DM_CRASH_##label);                                                       \
    } while (0)

void dm_crash_pass(int label) __attribute__((cold, visibility("hidden"), used));
int dm_crash_label(const char *name);
int dm_crash_arm(int label, uint64_t pass, const char *record);
int dm_crash_stop_at(int label, uint64_t pass);
void dm_crash_read_environment(void);

#endif
