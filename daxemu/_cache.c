/* See _cache.h for the contract. Frames filled, held, written back, and taken from others when there are too many. */
#define _GNU_SOURCE
#include "_cache.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOCK_BASE (1ll << 40) /* a byte beyond the control file's end names a user, as in daxemu/slots.py */
#define BOUNCES 4u            /* buffers of AHEAD blocks that a process reads into: that many reads at a time */

/* --------------------------------------------------------------- users */

/* Become a user: take a number nobody alive has, on a description of the control file that is ours alone. 0 or errno. */
int cache_join(int control_fd, struct cache_header *header, uint32_t *holder)
{
    for (uint32_t user = 0; user < USERS; user++) {
        struct flock range = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = LOCK_BASE + user, .l_len = 1};
        if (fcntl(control_fd, F_OFD_SETLK, &range))
            continue;
        __atomic_store_n(&header->promised[user], 0, __ATOMIC_SEQ_CST);
        for (uint64_t users = header->users; users <= user;)
            __atomic_compare_exchange_n(&header->users, &users, user + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        uint64_t incarnation = __atomic_add_fetch(&header->incarnations[user], 1, __ATOMIC_SEQ_CST);
        *holder = (user + 1) | (uint32_t)(incarnation & 0x7ffff) << 12;
        return 0;
    }
    return ENFILE;
}

static uint32_t user_of(uint32_t holder)
{
    return (holder & 0xfff) - 1;
}

static int is_gone(const struct cache *c, uint32_t user)
{
    struct flock range = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = LOCK_BASE + user, .l_len = 1};
    return !fcntl(c->control_fd, F_OFD_GETLK, &range) && range.l_type == F_UNLCK;
}

static int is_dead(const struct cache *c, uint32_t holder)
{
    uint32_t user = user_of(holder);
    if (holder == c->holder)
        return 0;
    if (user >= USERS || (__atomic_load_n(&c->header->incarnations[user], __ATOMIC_SEQ_CST) & 0x7ffff) != holder >> 12)
        return 1;
    return is_gone(c, user);
}

int cache_watching(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MISSING_SHMEM};
    if (fd < 0)
        return -errno;
    if (ioctl(fd, UFFDIO_API, &api)) {
        int failed = errno;
        close(fd);
        return -failed;
    }
    return fd;
}

int cache_watch(struct cache *c, void *address, uint64_t length)
{
    struct uffdio_register range = {.range = {(uintptr_t)address, length}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    return ioctl(c->uffd, UFFDIO_REGISTER, &range) ? errno : 0;
}

/* -------------------------------------------------------------- frames */

void frames_punch(const struct cache *c, uint64_t i, uint64_t frames)
{
    while (fallocate(c->frames_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(i * PAGE), (off_t)(frames * PAGE)) &&
           errno == EINTR)
        ;
}

/* How many frames have a page. */
uint64_t frames_pages(const struct cache *c)
{
    struct stat found;
    return fstat(c->frames_fd, &found) ? 0 : (uint64_t)found.st_blocks / (PAGE / 512);
}

/* Hold the word of frame `i`; *flags is what it says. Without `wait`, 0 when somebody alive has it. */
int frame_hold(const struct cache *c, uint64_t i, int wait, uint64_t *flags)
{
    uint64_t *word = &c->words[i];
    for (int spins = 100;;) {
        uint64_t seen = __atomic_load_n(word, __ATOMIC_SEQ_CST);
        uint32_t holder = (uint32_t)(seen & F_HOLDER);
        *flags = seen & ~(F_HOLDER | F_WAITED);
        if (!holder) {
            if (__atomic_compare_exchange_n(word, &seen, *flags | c->holder, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
                return 1;
            continue;
        }
        if (wait && spins-- > 0)
            continue;
        if (is_dead(c, holder)) {
            uint64_t mine = (seen & ~F_HOLDER) | c->holder;
            if (!__atomic_compare_exchange_n(word, &seen, mine, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
                continue;
            if (!(seen & F_RESIDENT))
                frames_punch(c, i, 1); /* half filled, or about to be punched by who had it */
            return 1;
        }
        if (!wait)
            return 0;
        uint64_t waited = seen | F_WAITED;
        if (seen & F_WAITED || __atomic_compare_exchange_n(word, &seen, waited, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            futex_wait((uint32_t *)word, (uint32_t)waited, 20);
    }
}

void frame_release(const struct cache *c, uint64_t i, uint64_t flags)
{
    uint64_t *word = &c->words[i];
    if (__atomic_exchange_n(word, flags & ~(F_HOLDER | F_WAITED), __ATOMIC_SEQ_CST) & F_WAITED)
        futex_wake((uint32_t *)word);
}

/* A held word's flags, as who takes over from us shall find them. */
void frame_note(const struct cache *c, uint64_t i, uint64_t flags)
{
    uint64_t *word = &c->words[i], seen = __atomic_load_n(word, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(word, &seen, (seen & (F_HOLDER | F_WAITED)) | flags, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        ;
}

uint64_t cache_frame(const struct cache *c, uint32_t space, uint64_t page, uint64_t word)
{
    uint64_t window = c->windows && !(word & PRIVATE) ? __atomic_load_n(&c->windows[2 * space], __ATOMIC_SEQ_CST) : 0;
    return window ? window + page : c->base + (word & PFN_MASK);
}

int frame_is_block(const struct cache *c, uint64_t i)
{
    return i >= c->base && i - c->base < c->frames;
}

/* By how many frames the limit is passed, with all that is promised. */
uint64_t frames_over(const struct cache *c)
{
    uint64_t count = frames_pages(c);
    for (uint64_t user = 0; user < c->header->users && user < USERS; user++)
        count += __atomic_load_n(&c->header->promised[user], __ATOMIC_RELAXED);
    return count > c->header->limit ? count - c->header->limit : 0;
}

/* What the dead had promised themselves is nobody's. */
static void forget_promises(const struct cache *c)
{
    for (uint32_t user = 0; user < c->header->users && user < USERS; user++) {
        uint64_t seen = __atomic_load_n(&c->header->promised[user], __ATOMIC_SEQ_CST);
        if (seen && user != user_of(c->holder) && is_gone(c, user))
            __atomic_compare_exchange_n(&c->header->promised[user], &seen, 0, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
}

/* Promise frames to who is about to fill them; where there are too many, others go first. */
int frames_promise(struct cache *c, uint64_t frames)
{
    __atomic_fetch_add(&c->header->promised[user_of(c->holder)], frames, __ATOMIC_SEQ_CST);
    if (!frames_over(c))
        return 1;
    forget_promises(c);
    uint64_t over = frames_over(c);
    if (!over || !frames_evict(c, over) || !frames_over(c))
        return 1; /* what others have been promised since they make room for */
    __atomic_fetch_add(&c->header->over, 1, __ATOMIC_RELAXED);
    return 0;
}

void frames_unpromise(const struct cache *c, uint64_t frames)
{
    uint64_t *promised = &c->header->promised[user_of(c->holder)], have = __atomic_load_n(promised, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(promised, &have, have > frames ? have - frames : 0, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        ;
}

/* ------------------------------------------------------------- filling */

char *bounce_take(struct cache *c, uint32_t *which)
{
    for (;;) {
        uint32_t seen = __atomic_load_n(&c->returned, __ATOMIC_SEQ_CST), busy = __atomic_load_n(&c->bounced, __ATOMIC_SEQ_CST);
        for (*which = 0; *which < BOUNCES; ++*which)
            if (!(busy >> *which & 1)) {
                if (__atomic_compare_exchange_n(&c->bounced, &busy, busy | 1u << *which, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
                    return c->bounce + *which * (size_t)(AHEAD * PAGE);
                break;
            }
        if (*which == BOUNCES)
            futex_wait(&c->returned, seen, 20);
    }
}

void bounce_give(struct cache *c, uint32_t which)
{
    __atomic_fetch_and(&c->bounced, ~(1u << which), __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&c->returned, 1, __ATOMIC_SEQ_CST);
    futex_wake(&c->returned);
}

/* A whole page at a time: nobody sees a page of the frame file before all of it has been written. */
int frames_put(const struct cache *c, uint64_t i, uint64_t frames, const char *from)
{
    for (uint64_t done = 0; done < frames * PAGE;) {
        ssize_t got = pwrite(c->frames_fd, from + done, frames * PAGE - done, (off_t)(i * PAGE + done));
        if (got < 0 && errno != EINTR)
            return errno;
        done += got > 0 ? (uint64_t)got : 0;
    }
    return 0;
}

/* Read what an inode's copy is to show: from the block's frame where it is there, since that may be newer than the block. */
static int read_for_copy(struct cache *c, uint64_t pfn, uint64_t frames, char *to)
{
    int failed = 0;
    for (uint64_t n = 0; n < frames && !failed; n++) {
        uint64_t flags;
        frame_hold(c, c->base + pfn + n, 1, &flags);
        if (flags & F_RESIDENT && !(failed = cache_show(c, pfn + n, 1)))
            memcpy(to + n * PAGE, c->pool + (pfn + n) * PAGE, PAGE);
        else if (!failed)
            failed = device_read(c->device, pfn + n, 1, to + n * PAGE);
        frame_release(c, c->base + pfn + n, flags);
    }
    return failed;
}

/* Fill held, absent frames. */
int frames_fill(struct cache *c, uint64_t i, uint64_t pfn, uint64_t frames)
{
    uint32_t which;
    char *buffer = bounce_take(c, &which);
    int failed = frame_is_block(c, i) ? device_read(c->device, pfn, frames, buffer) : read_for_copy(c, pfn, frames, buffer);
    if (failed)
        __atomic_fetch_add(&c->header->errors, 1, __ATOMIC_RELAXED);
    else
        failed = frames_put(c, i, frames, buffer);
    if (failed)
        frames_punch(c, i, frames);
    bounce_give(c, which);
    return failed;
}

/* Whether the copies held are still of what the entries say: who changes an entry drops the copy afterwards, and waits for us. */
static int is_current(const uint64_t *entries, uint64_t pfn, uint64_t frames)
{
    for (uint64_t n = 0; entries && n < frames; n++)
        if ((__atomic_load_n(&entries[n], __ATOMIC_SEQ_CST) & (PFN_MASK | PRIVATE | BEYOND)) != pfn + n)
            return 0;
    return 1;
}

int cache_is_there(struct cache *c, uint64_t i)
{
    uint64_t seen = __atomic_load_n(&c->words[i], __ATOMIC_SEQ_CST);
    if (!(seen & F_RESIDENT) || seen & F_HOLDER)
        return 0;
    __atomic_fetch_add(&c->header->hits, 1, __ATOMIC_RELAXED);
    if ((seen & F_FREQ) != F_FREQ)
        __atomic_compare_exchange_n(&c->words[i], &seen, seen + F_FREQ_ONE, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return 1;
}

int cache_need(struct cache *c, uint64_t i, uint64_t pfn, uint64_t ahead, const uint64_t *entries)
{
    uint64_t before[AHEAD], frames = 1;
    if (cache_is_there(c, i))
        return 0;
    frame_hold(c, i, 1, &before[0]);
    if (before[0] & F_RESIDENT) {
        frame_release(c, i, before[0]);
        return 0;
    }
    for (; frames < ahead && frames < AHEAD && frame_hold(c, i + frames, 0, &before[frames]); frames++)
        if (before[frames] & F_RESIDENT) {
            frame_release(c, i + frames, before[frames]);
            break;
        }
    if (!is_current(entries, pfn, frames)) { /* the touch comes again, and finds another frame */
        for (uint64_t n = 0; n < frames; n++)
            frame_release(c, i + n, before[n]);
        return 0;
    }
    if (!frames_promise(c, frames) && frames > 1) { /* no room to read ahead */
        for (uint64_t n = 1; n < frames; n++)
            frame_release(c, i + n, before[n]);
        frames_unpromise(c, frames - 1);
        frames = 1;
    }
    STEP(AT_FRAME_HELD);
    int failed = frames_fill(c, i, pfn, frames);
    STEP(AT_FRAME_FILLED);
    if (failed && frames > 1) { /* then what was asked for, alone */
        for (uint64_t n = 1; n < frames; n++)
            frame_release(c, i + n, before[n]);
        frames_unpromise(c, frames - 1);
        frames = 1;
        failed = frames_fill(c, i, pfn, 1);
    }
    if (failed) {
        frame_release(c, i, before[0]);
        frames_unpromise(c, 1);
        return failed;
    }
    __atomic_fetch_add(&c->header->inserted, frames, __ATOMIC_RELAXED);
    __atomic_fetch_add(&c->header->fills, frames, __ATOMIC_RELAXED);
    for (uint64_t n = 0; n < frames; n++)
        frame_release(c, i + n, frame_came_in(c, before[n]));
    frames_unpromise(c, frames);
    return 0;
}

/* ---------------------------------------------------------------- fork */

/* In the child, at fork: its mappings are watched by nobody, its name is the parent's. With a number of its own, mend both; else
 * let no touch through. */
void cache_in_child(struct cache *c)
{
    int fd = c->child_fd >= 0 ? cache_watching() : -1;
    close(c->uffd);
    c->uffd = fd;
    c->bounced = 0;
    c->evicting = 0;
    close(c->control_fd); /* the description on which the parent is known: open here, it would outlive the parent */
    c->control_fd = c->child_fd;
    if (fd >= 0)
        c->holder = c->child_holder;
    c->child_fd = -1;
    if (fd < 0 || cache_watch(c, c->pool, c->frames * PAGE))
        mmap(c->pool, c->frames * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}
