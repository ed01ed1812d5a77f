/* Requests to a block device, under conditions, with a journal. See _device.h. Async-signal-safe. */
#define _GNU_SOURCE
#include "_device.h"

#include "_fault.h" /* futex_wait, futex_wake */

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000ull
#define LOAD(place) __atomic_load_n(&(place), __ATOMIC_ACQUIRE)
#define COUNT(place, by) ((void)__atomic_fetch_add(&(place), (uint64_t)(by), __ATOMIC_SEQ_CST))

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
}

static void sleep_until(uint64_t when)
{
    struct timespec time = {(time_t)(when / SECOND), (long)(when % SECOND)};
    /* The kernel lets a sleeper sleep 50 us longer than asked, to wake several at once: as long as a fast device's whole latency. */
    long slack = syscall(SYS_prctl, PR_GET_TIMERSLACK, 0, 0, 0, 0);
    syscall(SYS_prctl, PR_SET_TIMERSLACK, 1, 0, 0, 0);
    while (syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) && errno == EINTR)
        ;
    if (slack > 0)
        syscall(SYS_prctl, PR_SET_TIMERSLACK, slack, 0, 0, 0);
}

/* Wait as long as the device is stalled; then as long as it takes with its latency and bandwidth to move the blocks. */
static void wait_for(struct conditions *c, uint64_t blocks)
{
    uint32_t stalled;
    while ((stalled = LOAD(c->stalled)))
        futex_wait(&c->stalled, stalled, 0);
    uint64_t latency = LOAD(c->latency), bandwidth = LOAD(c->bandwidth), when = 0;
    if (bandwidth && blocks) {
        uint64_t takes = (uint64_t)((unsigned __int128)blocks * DEVICE_BLOCK * SECOND / bandwidth);
        uint64_t next = LOAD(c->next), time = now();
        do
            when = (next > time ? next : time) + takes;
        while (!__atomic_compare_exchange_n(&c->next, &next, when, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    } else if (latency) {
        when = now();
    }
    if (when)
        sleep_until(when + latency);
}

static int fails(const struct conditions *c, uint64_t block, uint64_t blocks, uint64_t what)
{
    for (unsigned i = 0; i < FAILINGS; i++) {
        const struct failing *f = &c->failing[i];
        if ((LOAD(f->what) & what) && (what == FAIL_FLUSH || (LOAD(f->first) < block + blocks && block < LOAD(f->end))))
            return 1;
    }
    return 0;
}

static int check(const struct device *d, uint64_t block, uint64_t blocks)
{
    if (LOAD(d->fd) < 0)
        return EBADF;
    return block > d->blocks || blocks > d->blocks - block ? EIO : 0;
}

/* -------------------------------------------------------------- journal */

/* Identifies a request; ascends where the processes share conditions. */
static uint64_t sequence(const struct device *d)
{
    static uint32_t own;
    if (d->conditions)
        return __atomic_add_fetch(&d->conditions->sequence, 1, __ATOMIC_SEQ_CST);
    return (uint64_t)getpid() << 32 | __atomic_add_fetch(&own, 1, __ATOMIC_SEQ_CST);
}

/* One append: records of processes side by side do not mix. */
static int note(int journal, uint64_t kind, uint64_t block, uint64_t blocks, uint64_t sequence, const void *data)
{
    struct journal_record record = {JOURNAL_MAGIC, kind, block, blocks, sequence, JOURNAL_MAGIC ^ kind ^ block ^ blocks ^ sequence};
    size_t size = data ? blocks * DEVICE_BLOCK : 0;
    struct iovec parts[2] = {{&record, sizeof record}, {(void *)(uintptr_t)data, size}};
    ssize_t done;
    do
        done = writev(journal, parts, data ? 2 : 1);
    while (done < 0 && errno == EINTR);
    if (done < 0)
        return errno;
    return (size_t)done == sizeof record + size ? 0 : ENOSPC;
}

/* -------------------------------------------------------------- requests */

/* A request comes in: 0 when it is to be done, under *journal and *number if it is to be recorded. */
static int begin(const struct device *d, uint64_t kind, uint64_t block, uint64_t blocks, const void *data, int *journal, uint64_t *number)
{
    *journal = LOAD(d->journal_fd);
    if (*journal < 0)
        return 0;
    *number = sequence(d);
    return note(*journal, kind, block, blocks, *number, data);
}

static int done(int journal, uint64_t block, uint64_t blocks, uint64_t number)
{
    return journal < 0 ? 0 : note(journal, JOURNAL_DONE, block, blocks, number, NULL);
}

static int transfer(int fd, uint64_t block, uint64_t blocks, char *memory, int write)
{
    uint64_t at = block * DEVICE_BLOCK, left = blocks * DEVICE_BLOCK;
    while (left) {
        ssize_t moved = write ? pwrite(fd, memory, left, (off_t)at) : pread(fd, memory, left, (off_t)at);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved < 0) /* O_DIRECT can't go on within a block: the device ended, or failed, there */
            return errno == EINVAL && left % DEVICE_BLOCK ? EIO : errno;
        if (!moved)
            return EIO;
        memory += moved;
        at += (uint64_t)moved;
        left -= (uint64_t)moved;
    }
    return 0;
}

int device_read(const struct device *d, uint64_t block, uint64_t blocks, void *to)
{
    struct conditions *c = d->conditions;
    int failed = check(d, block, blocks);
    if (failed || !blocks)
        return failed;
    if (c) {
        COUNT(c->reads, 1);
        COUNT(c->read_blocks, blocks);
        wait_for(c, blocks);
        if (fails(c, block, blocks, FAIL_READ))
            return EIO;
    }
    return transfer(LOAD(d->fd), block, blocks, to, 0);
}

int device_write(const struct device *d, uint64_t block, uint64_t blocks, const void *from)
{
    struct conditions *c = d->conditions;
    int failed = check(d, block, blocks), journal;
    uint64_t number = 0;
    if (failed || !blocks)
        return failed;
    if (c) {
        COUNT(c->writes, 1);
        COUNT(c->written_blocks, blocks);
        wait_for(c, blocks);
        if (fails(c, block, blocks, FAIL_WRITE))
            return EIO;
    }
    failed = begin(d, JOURNAL_WRITE, block, blocks, from, &journal, &number);
    if (!failed)
        failed = transfer(LOAD(d->fd), block, blocks, (char *)(uintptr_t)from, 1);
    return failed ? failed : done(journal, block, blocks, number);
}

int device_flush(const struct device *d)
{
    struct conditions *c = d->conditions;
    int failed = check(d, 0, 0), journal;
    uint64_t number = 0;
    if (failed)
        return failed;
    if (c) {
        COUNT(c->flushes, 1);
        wait_for(c, 0);
        if (fails(c, 0, 0, FAIL_FLUSH))
            return EIO;
        if (LOAD(c->lose_flush))
            return 0;
    }
    failed = begin(d, JOURNAL_FLUSH, 0, 0, NULL, &journal, &number);
    if (failed)
        return failed;
    while (fdatasync(LOAD(d->fd)))
        if (errno != EINTR)
            return errno;
    return done(journal, 0, 0, number);
}

static int discard(int fd, uint64_t block, uint64_t blocks)
{
    struct stat status;
    if (fstat(fd, &status))
        return errno;
    uint64_t range[2] = {block * DEVICE_BLOCK, blocks * DEVICE_BLOCK};
    int failed;
    do
        failed = S_ISBLK(status.st_mode)
                     ? ioctl(fd, BLKDISCARD, range)
                     : fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)range[0], (off_t)range[1]);
    while (failed && errno == EINTR);
    return failed && errno != EOPNOTSUPP && errno != ENOSYS ? errno : 0;
}

int device_discard(const struct device *d, uint64_t block, uint64_t blocks)
{
    struct conditions *c = d->conditions;
    int failed = check(d, block, blocks), journal;
    uint64_t number = 0;
    if (failed || !blocks)
        return failed;
    if (c) {
        COUNT(c->discards, 1);
        wait_for(c, 0);
        if (fails(c, block, blocks, FAIL_WRITE))
            return EIO;
    }
    failed = begin(d, JOURNAL_DISCARD, block, blocks, NULL, &journal, &number);
    if (!failed)
        failed = discard(LOAD(d->fd), block, blocks);
    return failed ? failed : done(journal, block, blocks, number);
}

void device_stall(struct conditions *c, int on)
{
    __atomic_store_n(&c->stalled, on ? 1 : 0, __ATOMIC_SEQ_CST);
    if (!on)
        futex_wake(&c->stalled);
}

int device_reserve(const struct device *d, uint64_t block, uint64_t blocks)
{
    for (;;) {
        if (!fallocate(LOAD(d->fd), 0, (off_t)(block * DEVICE_BLOCK), (off_t)(blocks * DEVICE_BLOCK)))
            return 0;
        if (errno != EINTR)
            return errno == ENOSPC || errno == EDQUOT || errno == EFBIG ? ENOSPC : 0;
    }
}
