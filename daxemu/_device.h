/*
 * A device that can only be read and written, block by block, and the conditions that tests and benchmarks put it under.
 *
 * All of it may be called within a signal handler: system calls and memory only, no allocation, no Python, no lock. A request
 * waits uninterruptibly, as in a kernel: for the device, for its latency and bandwidth, and while the device is stalled.
 */
#ifndef ONECOPY_DEVICE_H
#define ONECOPY_DEVICE_H

#include <stdint.h>

#define DEVICE_BLOCK 4096u /* bytes: a page */

#define FAIL_READ 1u
#define FAIL_WRITE 2u /* and discard */
#define FAIL_FLUSH 4u /* wherever the blocks are */
#define FAILINGS 64u

/* Shared memory (MAP_SHARED) of all who use the device; any process changes it at any time. All zero: a sound, fast device.
 * blkcache/conditions.py declares it, too, and a test compares. */
struct conditions {
    uint64_t magic, layout;  /* who attaches compares these; requests don't */
    uint64_t latency;        /* nanoseconds added to each request */
    uint64_t bandwidth;      /* bytes a second for all requests together; 0: unlimited */
    uint64_t next;           /* when the device has moved all it has been asked to (CLOCK_MONOTONIC, ns) */
    uint32_t stalled, unused; /* futex: requests wait while it is not 0 */
    uint64_t lose_flush;     /* not 0: a flush says yes and does nothing */
    uint64_t sequence;       /* of the journal's records */
    /* Counted when a request arrives, before it waits or fails, so that who waits for a count finds the request on its way. */
    uint64_t reads, writes, read_blocks, written_blocks, flushes, discards;
    struct failing {
        uint64_t first, end; /* blocks [first, end) */
        uint64_t what;       /* FAIL_ bits, stored last; 0: none */
    } failing[FAILINGS];
};

/* The journal: what a power cut could leave can be rebuilt from it. A request that is recorded when it begins and when it is done;
 * it may have come to media from the first on, and it has once a flush that began after the second is done. */
#define JOURNAL_MAGIC 0x6c6e726a79706f63ull /* "copyjrnl" */
enum { JOURNAL_WRITE = 1, JOURNAL_DISCARD, JOURNAL_FLUSH, JOURNAL_DONE };
struct journal_record {      /* then, after a JOURNAL_WRITE, the data */
    uint64_t magic, kind;
    uint64_t block, blocks;
    uint64_t sequence;       /* of the request; JOURNAL_DONE: of the request that is done */
    uint64_t check;          /* exclusive or of the words before: a process killed while it writes may leave part of a record */
};

struct device {
    int fd;                  /* -1: closed */
    int journal_fd;          /* opened with O_APPEND; -1: none */
    struct conditions *conditions; /* may be NULL */
    uint64_t blocks;
};

/* All return 0 or an errno: EIO beyond the end or when the device gave less, what the system call said otherwise, EBADF when closed.
 * Interrupted calls and short transfers are continued. Memory must be as aligned as `fd` wants it: to a page with O_DIRECT. */
int device_read(const struct device *d, uint64_t block, uint64_t blocks, void *to);
int device_write(const struct device *d, uint64_t block, uint64_t blocks, const void *from);
int device_flush(const struct device *d); /* writes that are done are durable: fdatasync */
/* The blocks' content is of no interest: they read as zeros, or as before. Where the device can't, nothing happens, and that is 0. */
int device_discard(const struct device *d, uint64_t block, uint64_t blocks);
/* The blocks can be written, whatever else comes to lie on the device's host: ENOSPC says no. Where blocks are always there, 0. */
int device_reserve(const struct device *d, uint64_t block, uint64_t blocks);
void device_stall(struct conditions *c, int on);

#endif
