/* See _cache.h for the contract. Frames stored to, owned, written back and dropped. */
#define _GNU_SOURCE
#include "_cache.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

static const char zeros[PAGE];

/* Hold block `pfn`'s frame, with what it holds in its page; or, where all of it is about to be stored to, without one. 0 or errno; then
 * it is not held. A promise is made for it, which `store_done` takes back. */
static int hold_filled(struct cache *c, uint64_t pfn, int whole, uint64_t *flags, int *promised)
{
    uint64_t i = c->base + pfn;
    frame_hold(c, i, 1, flags);
    int there = (*flags & F_RESIDENT) != 0;
    *promised = !there;
    if (there)
        return 0;
    frames_promise(c, 1);
    int failed = whole ? 0 : frames_fill(c, i, pfn, 1);
    if (failed) {
        frames_unpromise(c, 1);
        frame_release(c, i, *flags);
        return failed;
    }
    __atomic_fetch_add(&c->header->inserted, 1, __ATOMIC_RELAXED);
    if (!whole)
        __atomic_fetch_add(&c->header->fills, 1, __ATOMIC_RELAXED);
    *flags = frame_came_in(c, *flags);
    if (!whole)
        frame_note(c, i, *flags);
    return 0;
}

/* Give it back. A store that failed before the frame had a page leaves it absent. */
static void store_done(struct cache *c, uint64_t pfn, uint64_t flags, int failed, int promised)
{
    uint64_t i = c->base + pfn;
    if (failed && !(__atomic_load_n(&c->words[i], __ATOMIC_SEQ_CST) & F_RESIDENT)) {
        frames_punch(c, i, 1);
        frame_left(c, flags);
        flags = 0;
    }
    frame_release(c, i, flags);
    if (promised)
        frames_unpromise(c, 1);
}

int cache_store(struct cache *c, uint64_t offset, const char *from, uint64_t size)
{
    int failed = 0;
    while (size && !failed) {
        uint64_t pfn = offset / PAGE, start = offset % PAGE, part = PAGE - start < size ? PAGE - start : size, flags;
        int promised;
        failed = hold_filled(c, pfn, part == PAGE, &flags, &promised);
        if (failed)
            break;
        if (__atomic_load_n(&c->words[c->base + pfn], __ATOMIC_SEQ_CST) & F_RESIDENT)
            frame_note(c, c->base + pfn, flags | F_DIRTY); /* should we die now, what has been seen of this stays */
        for (uint64_t done = 0; done < part && !failed;) {
            ssize_t got = pwrite(c->frames_fd, from + done, part - done, (off_t)((c->base + pfn) * PAGE + start + done));
            if (got < 0 && errno != EINTR)
                failed = errno;
            done += got > 0 ? (uint64_t)got : 0;
        }
        STEP(AT_FRAME_STORED);
        store_done(c, pfn, flags | F_DIRTY, failed, promised);
        offset += part;
        from += part;
        size -= part;
    }
    return failed;
}

int cache_copy(struct cache *c, uint64_t from, uint64_t to)
{
    uint32_t which;
    uint64_t flags;
    int failed = 0;
    char *buffer = bounce_take(c, &which);
    if (!from)
        memcpy(buffer, zeros, PAGE);
    else {
        frame_hold(c, c->base + from, 1, &flags);
        if (flags & F_RESIDENT && !(failed = cache_show(c, from, 1)))
            memcpy(buffer, c->pool + from * PAGE, PAGE);
        else if (!failed)
            failed = device_read(c->device, from, 1, buffer); /* about to be replaced, for this file: no need of a frame */
        frame_release(c, c->base + from, flags);
    }
    if (!failed)
        failed = cache_store(c, to * PAGE, buffer, PAGE);
    bounce_give(c, which);
    return failed;
}

int cache_clear(struct cache *c, uint64_t pfn, uint64_t first, uint64_t end)
{
    return cache_store(c, pfn * PAGE + first, zeros, end - first);
}

static void keep(const struct cache *c, uint64_t flags)
{
    if (!(flags & F_KEPT))
        __atomic_fetch_add(c->kept, 1, __ATOMIC_RELAXED);
}

static void keep_no_more(const struct cache *c, uint64_t flags)
{
    if (flags & F_KEPT)
        __atomic_fetch_sub(c->kept, 1, __ATOMIC_RELAXED);
}

int cache_ready(struct cache *c, uint64_t pfn, uint64_t pages)
{
    uint64_t kept = pages;
    for (uint32_t d = 0; d < DEVICES; d++)
        kept += __atomic_load_n(&c->header->kept[d], __ATOMIC_RELAXED);
    if (kept > c->header->limit / 2)
        return ENOSPC; /* the caller writes back what is kept, and tries again */
    int failed = 0;
    for (uint64_t end = pfn + pages; pfn < end && !failed; pfn++) {
        uint64_t flags, i = c->base + pfn;
        int promised;
        hold_filled(c, pfn, 1, &flags, &promised);
        if (promised)
            failed = frames_put(c, i, 1, zeros);
        if (!failed)
            keep(c, flags);
        store_done(c, pfn, failed ? flags : flags | F_DIRTY | F_KEPT, failed, promised);
    }
    return failed;
}

int cache_own(struct cache *c, uint32_t space, uint64_t page, uint64_t pfn, uint64_t pages)
{
    for (uint64_t n = 0; n < pages; n++) {
        uint64_t flags;
        int promised, failed = hold_filled(c, pfn + n, 0, &flags, &promised);
        if (failed)
            return failed;
        __atomic_store_n(&c->owners[pfn + n], (uint64_t)space << 32 | (page + n), __ATOMIC_SEQ_CST);
        store_done(c, pfn + n, flags | F_WRITABLE | F_DIRTY, 0, promised);
    }
    return 0;
}

int cache_may_write(const struct cache *c, uint64_t pfn)
{
    return (__atomic_load_n(&c->words[c->base + pfn], __ATOMIC_SEQ_CST) & (F_WRITABLE | F_RESIDENT | F_HOLDER)) ==
           (F_WRITABLE | F_RESIDENT);
}

/* -------------------------------------------------------- writing back */

/* Whether some process may have the frame, held, mapped for storing: who owned it for that may have no mappers left. Mappers come
 * and go under the transaction lock, which who writes back holds: without any now, nobody has stored since before the write. */
static int may_be_stored_to(const struct cache *c, uint64_t pfn)
{
    uint64_t owner = __atomic_load_n(&c->owners[pfn], __ATOMIC_SEQ_CST) >> 32, any = !c->engine || owner >= *c->engine->spaces_used;
    for (uint32_t w = 0; w < SLOTS / 64 && !any; w++)
        any = __atomic_load_n(&c->engine->spaces[owner].mappers[w], __ATOMIC_SEQ_CST);
    return any != 0;
}

int cache_write_back(struct cache *c, uint64_t pfn, uint64_t pages)
{
    uint64_t flags[AHEAD], end = pfn + pages;
    while (pfn < end) {
        uint64_t seen = __atomic_load_n(&c->words[c->base + pfn], __ATOMIC_SEQ_CST), frames = 0;
        if (!(seen & (F_DIRTY | F_HOLDER))) {
            pfn++;
            continue;
        }
        while (frames < AHEAD && pfn + frames < end && frame_hold(c, c->base + pfn + frames, !frames, &flags[frames])) {
            if (!(flags[frames] & F_DIRTY)) {
                frame_release(c, c->base + pfn + frames, flags[frames]);
                break;
            }
            frames++;
        }
        if (!frames) {
            pfn++;
            continue;
        }
        int failed = frames_write(c, c->base + pfn, frames);
        for (uint64_t n = 0; n < frames; n++) {
            uint64_t keep = flags[n];
            if (!failed) {
                keep_no_more(c, keep);
                keep &= ~(keep & F_WRITABLE && may_be_stored_to(c, pfn + n) ? F_KEPT : F_KEPT | F_DIRTY | F_WRITABLE);
            }
            frame_release(c, c->base + pfn + n, keep);
        }
        if (failed)
            return failed;
        pfn += frames;
    }
    if (pages == c->frames) /* who does that holds the transaction lock: nobody makes nodes, and who died over one has counted wrong */
        __atomic_store_n(c->kept, 0, __ATOMIC_RELAXED);
    return 0;
}

/* Forget what the device has, too: nobody uses it for now. */
void cache_trim(struct cache *c)
{
    for (uint64_t i = c->base; i < c->base + c->frames; i++) {
        uint64_t flags;
        if (!(__atomic_load_n(&c->words[i], __ATOMIC_SEQ_CST) & F_RESIDENT) || !frame_hold(c, i, 0, &flags))
            continue;
        if (flags & F_RESIDENT && !(flags & (F_DIRTY | F_KEPT))) {
            frame_note(c, i, 0);
            frames_punch(c, i, 1);
            frame_left(c, flags);
            flags = 0;
        }
        frame_release(c, i, flags);
    }
}

void cache_moved(struct cache *c, uint32_t space, uint64_t page, uint64_t pages)
{
    uint64_t window = c->windows ? __atomic_load_n(&c->windows[2 * space], __ATOMIC_SEQ_CST) : 0;
    if (window)
        cache_drop(c, window + page, pages);
}

void cache_drop(struct cache *c, uint64_t i, uint64_t pages)
{
    for (uint64_t end = i + pages; i < end;) {
        uint64_t flags, run = 0;
        if (!__atomic_load_n(&c->words[i], __ATOMIC_SEQ_CST)) {
            i++;
            continue;
        }
        while (i + run < end && run < AHEAD && frame_hold(c, i + run, !run, &flags)) {
            keep_no_more(c, flags);
            frame_left(c, flags);
            frame_note(c, i + run, 0);
            run++;
        }
        frames_punch(c, i, run);
        for (uint64_t n = 0; n < run; n++)
            frame_release(c, i + n, 0);
        i += run;
    }
}
