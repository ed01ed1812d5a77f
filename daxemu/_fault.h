/*
 * The native half of onecopy: the write fault, the shootdown, the entry words. What Python can't say, and no more.
 *
 *   _guard.c    waiting, the lock over a process's translations, and what a fork waits for
 *   _map.c      a process's regions: mapped as the entries say, within its budget of VMAs
 *   _shoot.c    messages to other processes, and the service thread that answers them
 *   _fault.c    a store to a shared page gives the file pages of its own
 *   _handler.c  the signal handlers that notice it, and who was there before
 *   _commit.c   blocks of entries locked, a transaction published, its changes of entries applied, redone after a death
 *   _cache.c, _cached.c, _evict.c, _absent.c: frames of a device that can only be read and written, see _cache.h; _device.c, the device
 *   _module.c   the Python module over these (_module.h), its types in _words.c, _region.c, _engine.c and _entries.c
 *
 * An address space is an array of entries in the run-time file: file page -> PFN and state. Rules that all code here keeps:
 *
 * - An entry changes only while its block (512 pages) is locked. The lock word names the holder's slot, so that who waits can
 *   see that the holder is dead, take the block over and finish what it left (repair, in _commit.c).
 * - A PRIVATE entry's page belongs to this file alone (S2); nothing else is mapped writable. Its PFN changes and PRIVATE goes only under the
 *   transaction lock (freeze, commit); the fault handler only ever makes pages private.
 * - First the new entries, then a fence, then the mappers are read. A process enters itself as a mapper first and
 *   reads the entries then. Of the two orders one holds: it sees the new entries, or it is seen and gets a message.
 * - Who changes an entry has its block locked until all have answered: a frame that entries don't name any more is shown by nobody once
 *   its block has been seen unlocked. Who frees frames for not being named by entries waits for that first (await_faults).
 * - A message says which pages to look up again. The receiver reads their entries and remaps under the process's own
 *   `guard`, so a remapping by an older look can't come after one by a newer.
 * - Nothing waits for another process with `guard` held, and a service thread takes no other lock: two processes that shoot at
 *   each other can't wait in a circle. Nothing here needs the interpreter: a thread may fault while it holds the interpreter's lock.
 * - The handler's part: system calls and memory only. No allocation, no Python, no stdio. All signals are blocked while
 *   it, or any code that holds `guard` or a block, runs.
 */
#ifndef ONECOPY_FAULT_H
#define ONECOPY_FAULT_H

#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096u
#define BLOCK 512u          /* pages under one lock: 2 MiB */
#define SLOTS 512u
#define RECORDS 4u          /* faults, commits or freezes of one process at the same time; more wait */
#define FEW 4u              /* pages that a store copies, which no store came before: measured, see DECISIONS.md */
#define MOST 128u           /* ... and when stores come in turn */
#define SPACES 65536u
#define LOCKS (4u << 20)    /* bytes of lock words at the start of a window: 2^28 pages */
#define WINDOW (1ull << 32) /* bytes of the run-time file a space's window takes, nearly all of it hole */
#define MAX_PAGES (1ull << 28)

#define PFN_MASK ((1ull << 40) - 1)
#define PRIVATE (1ull << 40) /* this file's alone; stores go there */
#define DIRTY (1ull << 41)   /* not in the extents yet */
#define FREEZING (1ull << 43) /* was PRIVATE; a freeze is under way, or was when its process died */
#define BEYOND (1ull << 42)  /* past the end of the file: a touch is a SIGBUS */

/* Frame states, as in blkcache/frames.py. */
#define BACKED 128u
#define HELD 195u /* USED | FRESH | DIRTY | BACKED: taken by a fault, in no extent yet */
#define USED 1u

#define KEEP (1ull << 32) /* run: conflicts with stores since the space was frozen */
#define ZERO (1ull << 33) /* run: clear bytes [pages >> 16, pages & 0xffff) of frame `word` */
#define HAND (1ull << 35) /* run: frames `word` on, taken by faults, are the trees' now, wherever; behind the runs of all spaces */
#define FOLD (1ull << 34) /* run: what stores had made has come into the extents; an entry that moved on since stays as it is */

/* Records of the run-time file; daxemu/runtime.py declares them, too, and a test compares. */
struct space {
    uint64_t subvolume, inode, state;
    uint64_t pages;   /* entries in the window; 0: none, the space is only mapped read-only */
    uint64_t next;    /* in the hash chain: index + 1 */
    uint64_t length;  /* pages: of the longest mapping */
    uint64_t dirty;   /* counts stores to shared pages; 0: none since all was folded */
    uint64_t version; /* odd while a commit changes the entries; goes on when the record is used for another inode */
    uint64_t mappers[SLOTS / 64];
};
struct record { /* a message, and what a fault has claimed */
    uint32_t futex, kind;
    uint64_t space, low, high;
    uint64_t claimed, count;
    uint64_t acks[SLOTS / 32]; /* low half: slots that have not answered yet; high half: the message's number */
    uint32_t number, unused;
    uint64_t unused2;
};
struct bell {
    uint32_t futex, unused;
    uint64_t bits[SLOTS * RECORDS / 64]; /* records that hold a message for this slot */
    uint64_t unused2[7];
};
struct run {
    uint64_t space; /* with KEEP, ZERO or FOLD; ascending by space and page, disjoint */
    uint64_t page, pages, word;
};
struct counters {
    int64_t held;
    uint64_t hint, faults, copied, shootdowns, strays, dirty, epoch;
    uint64_t times[56]; /* of shootdowns: 4 to a doubling, from 1 us */
};

enum { REMAP = 1, PROTECT, LOG };

struct engine;
struct region {
    struct engine *engine;
    struct region *next; /* of the same space */
    char *address;
    uint64_t pages;
    uint32_t space;
    int writable;
    uint32_t granule, fixed; /* pages copied by the next fault; fixed: never more */
    uint64_t streak;         /* where the last fault's granule ended */
    uint64_t read_end, ahead; /* where the last blocks read ended, and how many they were */
    int evicted;             /* pages may be unmapped: a touch maps them */
};

struct engine {
    struct engine *next;
    char *base, *pool;
    uint8_t *table;
    struct space *spaces;
    struct record *records;
    struct bell *bells;
    struct counters *counters;
    struct run *log;
    uint64_t *incarnations, incarnation; /* of all slots, 8 words apart; and of ours */
    uint64_t gone[SLOTS]; /* 1 + the incarnation in which a slot's holder was seen dead: it need not be waited for again */
    uint64_t *live, *free, *floor, *log_count, *log_generation, *log_owner, *spaces_used;
    uint64_t windows, frames, reserve;
    int runtime_fd, pool_fd, end_fd;
    int huge; /* the pool's host has pages of a block */
    uint32_t slot;
    int child_slot, child_fds[2]; /* made for the next fork: -1, or a slot, and descriptors that are the child's alone */
    int alive; /* has a slot and a service thread: not so in a child that nobody prepared */
    uint32_t stopping;
    uint32_t busy[RECORDS], freed; /* records in use; futex */
    uint32_t dirty, fold_at;       /* pages since the last fold; futex */
    uint64_t moved[2]; /* pages that the commit under way has moved in the space it is at */
    pthread_t service;
    char **window;
    struct region **chain;
    struct cache *cache; /* NULL: the pool's pages are the frames, always there */
};

extern void (*fault_step)(int); /* tests stop or kill the process at a numbered step */
#define STEP(n) do { if (fault_step) fault_step(n); } while (0)
enum { AT_LOCKED, AT_CLAIMED, AT_COPIED, AT_HALF, AT_ENTERED, AT_SHOT, AT_MAPPED, AT_ALL_LOCKED, AT_LIVE, AT_APPLIED, AT_FORGOTTEN,
       AT_FRAME_HELD, AT_FRAME_FILLED, AT_STORES_STOPPED, AT_WRITTEN_BACK, AT_PUNCHED, AT_FRAME_STORED };

/* _guard.c */
void guard_enter(sigset_t *before);
void guard_leave(const sigset_t *before);
void guard_lock(void);
void guard_unlock(void);
void block_signals(sigset_t *before);
void restore_signals(const sigset_t *before);
int futex_wait(uint32_t *word, uint32_t value, long milliseconds);
void futex_wake(uint32_t *word);
int slot_alive(struct engine *e, uint32_t slot);
void engines_add(struct engine *e);
void engines_remove(struct engine *e);
void fault_enter(void); /* waits while a fork is under way */
void fault_leave(void);
int adopt(struct engine *e, uint32_t slot); /* in a forked child, before it touches anything: be who holds the slot; 0 or errno */

/* _map.c */
uint64_t *entries_of(struct engine *e, uint32_t space); /* NULL: no address space left for the window */
uint64_t *locks_of(struct engine *e, uint32_t space);
/* 0 or errno; takes the guard. `stores`: private pages writable; then all of [low, high) is in blocks that the caller holds. */
int refresh(struct engine *e, uint32_t space, uint64_t low, uint64_t high, int stores);
void evict(struct region *r);                                                /* under the guard */
void evict_all(struct engine *e);                                            /* the same */
int map_around(struct region *r, uint64_t page);                            /* under the guard */
int protect(struct engine *e, uint32_t space, uint64_t low, uint64_t high);
int apply_log(struct engine *e, uint32_t space);
int map_region(struct region *r, uint64_t low, uint64_t high);
void region_add(struct region *r);
void region_remove(struct region *r);
struct region *region_at(const char *address); /* under the guard */
int too_many_maps(void);

/* _shoot.c */
/* 0, or ETIMEDOUT with the slot in *stuck when `patience` (milliseconds; 0: for ever) ran out. */
int shoot(struct engine *e, uint32_t record, uint32_t space, int kind, uint64_t low, uint64_t high, long patience, uint32_t *stuck);
int service_start(struct engine *e);
void service_stop(struct engine *e);

/* _fault.c */
int claim(struct engine *e, uint64_t pfn, uint64_t pages, uint8_t state);
int make_private(struct engine *e, uint32_t space, uint64_t low, uint64_t high, int map);
/* A store to `page`, by who holds nothing; [page, *high) can be stored to then. 0 or errno. */
int fault_page(struct engine *e, uint32_t space, uint64_t page, uint64_t granule, uint64_t holes, uint64_t *high);
int handler_install(int signal);
int handler_needed(int signal); /* whether it was installed before */
uint32_t record_take(struct engine *e);
void record_give(struct engine *e, uint32_t record);

/* _absent.c */
int absent(char *address); /* a touch of a frame without a page: 0 when it has one now, -1: not ours, or an errno, after a word about it */

/* _commit.c */
int block_lock(struct engine *e, uint32_t record, uint32_t space, uint64_t block); /* 0, or ENOMEM */
void block_unlock(struct engine *e, uint32_t space, uint64_t block);
void await_faults(struct engine *e, uint32_t space); /* until nobody shows what the entries named before the caller's last look */
int freeze(struct engine *e, uint32_t space, uint64_t low, uint64_t high, uint64_t *words, long patience, uint32_t *stuck);
uint64_t log_runs(const struct engine *e);
int log_is_published(struct engine *e);
int64_t commit(struct engine *e, uint64_t generation); /* -1, or the log run that stores conflict with, or -2 - errno */
void redo(struct engine *e);
void bury(struct engine *e, uint32_t slot);

#endif
