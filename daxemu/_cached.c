/* See _cache.h for the contract. Frames stored to, owned, written back and dropped. */
#define _GNU_SOURCE
#include "_cache.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

static const char zeros[PAGE];

/* Hold block `pfn`'s frame with a page in it: what it holds, or, where all of it is about to be stored to, anything. */
static int hold_filled(struct cache *c, uint64_t pfn, int whole, uint64_t *flags)
{
    uint64_t i = c->base + pfn;
    frame_hold(c, i, 1, flags);
    if (*flags & F_RESIDENT)
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

int cache_store(struct cache *c, uint64_t offset, const char *from, uint64_t size)
{
    while (size) {
        uint64_t pfn = offset / PAGE, start = offset % PAGE, part = PAGE - start < size ? PAGE - start : size, flags;
        int failed = hold_filled(c, pfn, part == PAGE, &flags);
        if (failed)
            return failed;
        if (__atomic_load_n(&c->words[c->base + pfn], __ATOMIC_SEQ_CST) & F_RESIDENT)
            frame_note(c, c->base + pfn, flags | F_DIRTY); /* should we die over it: what has been stored has been seen */
        for (uint64_t done = 0; done < part && !failed;) {
            ssize_t got = pwrite(c->frames_fd, from + done, part - done, (off_t)((c->base + pfn) * PAGE + start + done));
            if (got < 0 && errno != EINTR)
                failed = errno;
            done += got > 0 ? (uint64_t)got : 0;
        }
        if (failed && !(__atomic_load_n(&c->words[c->base + pfn], __ATOMIC_SEQ_CST) & F_RESIDENT)) {
            frames_punch(c, c->base + pfn, 1);
            frames_unpromise(c, 1);
            frame_left(c, flags);
            frame_release(c, c->base + pfn, 0);
            return failed;
        }
        STEP(AT_FRAME_STORED);
        frame_release(c, c->base + pfn, flags | F_DIRTY);
        if (failed)
            return failed;
        offset += part;
        from += part;
        size -= part;
    }
    return 0;
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
        __atomic_fetch_add(&c->header->kept, 1, __ATOMIC_RELAXED);
}

static void keep_no_more(const struct cache *c, uint64_t flags)
{
    if (flags & F_KEPT)
        __atomic_fetch_sub(&c->header->kept, 1, __ATOMIC_RELAXED);
}

/* Who died between a word and the counter has left it wrong. */
static uint64_t recount_kept(const struct cache *c)
{
    uint64_t kept = 0;
    for (uint32_t d = 0; d < DEVICES; d++)
        for (uint64_t i = d * SPAN, end = i + c->header->frames[d]; i < end; i++)
            kept += (__atomic_load_n(&c->words[i], __ATOMIC_RELAXED) & F_KEPT) != 0;
    __atomic_store_n(&c->header->kept, kept, __ATOMIC_RELAXED);
    return kept;
}

int cache_ready(struct cache *c, uint64_t pfn, uint64_t pages)
{
    uint64_t most = c->header->limit / 2;
    if (__atomic_load_n(&c->header->kept, __ATOMIC_RELAXED) + pages > most && recount_kept(c) + pages > most)
        return ENOSPC; /* the caller writes back what is kept, and tries again */
    for (uint64_t end = pfn + pages; pfn < end; pfn++) {
        uint64_t flags, i = c->base + pfn;
        hold_filled(c, pfn, 1, &flags);
        int failed = __atomic_load_n(&c->words[i], __ATOMIC_SEQ_CST) & F_RESIDENT ? 0 : frames_put(c, i, 1, zeros);
        if (failed) {
            frames_punch(c, i, 1);
            frames_unpromise(c, 1);
            frame_left(c, flags);
            frame_release(c, i, 0);
            return failed;
        }
        keep(c, flags);
        frame_release(c, i, flags | F_DIRTY | F_KEPT);
    }
    return 0;
}

int cache_own(struct cache *c, uint32_t space, uint64_t page, uint64_t pfn, uint64_t pages)
{
    for (uint64_t n = 0; n < pages; n++) {
        uint64_t flags;
        int failed = hold_filled(c, pfn + n, 0, &flags);
        if (failed)
            return failed;
        __atomic_store_n(&c->owners[pfn + n], (uint64_t)space << 32 | (page + n), __ATOMIC_SEQ_CST);
        frame_release(c, c->base + pfn + n, flags | F_WRITABLE | F_DIRTY);
    }
    return 0;
}

int cache_may_write(const struct cache *c, uint64_t pfn)
{
    return (__atomic_load_n(&c->words[c->base + pfn], __ATOMIC_SEQ_CST) & (F_WRITABLE | F_RESIDENT | F_HOLDER)) ==
           (F_WRITABLE | F_RESIDENT);
}

/* -------------------------------------------------------- writing back */

/* Whether some process may have the frame, held, mapped for storing: who owned it for that may have no mappers left. */
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
    return 0;
}

int cache_flush(struct cache *c)
{
    return device_flush(c->device);
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
        uint64_t flags, run = 0, pages = 0;
        if (!__atomic_load_n(&c->words[i], __ATOMIC_SEQ_CST)) {
            i++;
            continue;
        }
        while (i + run < end && run < AHEAD && frame_hold(c, i + run, !run, &flags)) {
            keep_no_more(c, flags);
            pages += (flags & F_RESIDENT) != 0;
            frame_left(c, flags);
            frame_note(c, i + run, 0);
            run++;
        }
        frames_punch(c, i, run);
        frames_unpromise(c, pages);
        for (uint64_t n = 0; n < run; n++)
            frame_release(c, i + n, 0);
        i += run;
    }
}
