/* See _cache.h for the contract. Which frames go when there are too many, and how they go. */
#define _GNU_SOURCE
#include "_cache.h"

#include <time.h>

/*
 * The policy is S3-FIFO's (Yang et al., SOSP 2023) without its queues: a sweep over the words, and stamps in place of order. Which
 * rules and constants is measured in benchmarks/replacement.py, which does the same in Python.
 *
 * A frame comes in as one of the small part, or, if it was evicted not long ago, of the main part. Of the small part a frame that was
 * used twice moves to the main part when the sweep comes by, others go; it has PASSED units of time before that. Of the main part a
 * frame goes if it has not been used as often as the sweep has come by; but nothing of it goes while the small part has its share.
 * What is dirty costs more to evict: it is passed over for a while.
 */
enum { UNITS = 32, PASSED = 2, USES = 2, SHARE = 5, SPARED = 16, LAPS = 5 };

static uint64_t now(const struct cache *c)
{
    uint64_t unit = c->header->limit / UNITS + 1;
    return (__atomic_load_n(&c->header->inserted, __ATOMIC_RELAXED) / unit + UNITS + 1) & 0xffff;
}

static uint64_t age(const struct cache *c, uint64_t flags)
{
    return (now(c) - (flags >> F_STAMP)) & 0xffff;
}

uint64_t frame_came_in(const struct cache *c, uint64_t before)
{
    int main = before >> F_STAMP && age(c, before) < UNITS;
    if (main)
        __atomic_fetch_add(&c->header->mains, 1, __ATOMIC_RELAXED);
    return F_RESIDENT | (main ? F_MAIN : 0) | now(c) << F_STAMP;
}

void frame_left(const struct cache *c, uint64_t flags)
{
    uint64_t have = __atomic_load_n(&c->header->mains, __ATOMIC_RELAXED);
    if (flags & F_MAIN && have)
        __atomic_compare_exchange_n(&c->header->mains, &have, have - 1, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

static uint64_t small_part(const struct cache *c)
{
    uint64_t mains = __atomic_load_n(&c->header->mains, __ATOMIC_RELAXED); /* who evicts has a full cache */
    return c->header->limit > mains ? c->header->limit - mains : 0;
}

/* Whether the sweep takes this frame; else *flags is what it becomes. `late`: it has been all the way round. */
static int is_victim(const struct cache *c, uint64_t *flags, int late)
{
    if (!(*flags & F_RESIDENT) || *flags & F_KEPT || (*flags & F_DIRTY && !late && age(c, *flags) < SPARED))
        return 0;
    if (*flags & F_MAIN) {
        if (!late && small_part(c) >= c->header->limit / SHARE)
            return 0;
        if (!(*flags & F_FREQ))
            return 1;
        *flags -= F_FREQ_ONE;
        return 0;
    }
    if (!late && age(c, *flags) < PASSED)
        return 0;
    if ((*flags & F_FREQ) < USES * F_FREQ_ONE)
        return 1;
    *flags = (*flags & ~F_FREQ) | F_MAIN;
    return 0;
}

/* Where the sweep is: frames of all devices, and the copies, one after the other. */
static uint64_t sweep_length(const struct cache *c)
{
    uint64_t length = 0;
    for (uint32_t d = 0; d < DEVICES; d++)
        length += c->header->frames[d] + c->header->copies[d];
    return length;
}

static uint64_t sweep_place(const struct cache *c, uint64_t position, uint64_t *left)
{
    for (uint32_t d = 0; d < DEVICES; d++) {
        uint64_t frames = c->header->frames[d], copies = c->header->copies[d];
        if (position < frames) {
            *left = frames - position;
            return d * SPAN + position;
        }
        position -= frames;
        if (position < copies) {
            *left = copies - position;
            return d * SPAN + COPIES + position;
        }
        position -= copies;
    }
    *left = 0;
    return 0;
}

#define BATCH 32u
#define REFUSALS 8 /* batches of which nothing can go, after which it is given up, when the device refuses requests: it is full */
#define PATIENCE 300  /* ms that a process may take to stop storing; it may have been stopped itself */
#define ASK_AGAIN 1000 /* ms after which one that did not is asked again */

static uint64_t milliseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* Far too many frames: who could make room is waited for, however long. */
static int is_crowded(const struct cache *c)
{
    return frames_pages(c) >= c->header->limit + c->header->limit / 8;
}

/* Whether frames that somebody may be storing to are to stay for now. */
static int is_stuck(const struct cache *c)
{
    return __atomic_load_n(&c->stuck, __ATOMIC_RELAXED) > milliseconds() && !is_crowded(c);
}

/* Tell all who may be storing to these frames, held: they stop. The frames are one run of a file's pages, or each its own. ETIMEDOUT. */
static int stop_stores(struct cache *c, const uint64_t *victims, uint32_t count)
{
    struct engine *e = c->engine;
    uint32_t free = 0, slot;
    int failed = 0;
    while (!__atomic_compare_exchange_n(&c->evicting, &free, 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        futex_wait(&c->evicting, free, 20);
        free = 0;
    }
    long patience = is_crowded(c) ? 0 : PATIENCE;
    for (uint32_t n = 0; n < count && !failed;) {
        uint64_t owner = c->owners[victims[n] - c->base];
        uint32_t run = 1;
        while (n + run < count && c->owners[victims[n + run] - c->base] == owner + run)
            run++;
        uint32_t space = (uint32_t)(owner >> 32);
        uint64_t page = owner & 0xffffffff;
        failed = shoot(e, e->slot * RECORDS + RECORDS - 1, space, PROTECT, page, page + run, patience, &slot);
        protect(e, space, page, page + run);
        n += run;
    }
    if (failed)
        __atomic_store_n(&c->stuck, milliseconds() + ASK_AGAIN, __ATOMIC_RELAXED);
    __atomic_store_n(&c->evicting, 0, __ATOMIC_SEQ_CST);
    futex_wake(&c->evicting);
    return failed;
}

/* Write held frames back whose blocks are in a row. */
int frames_write(struct cache *c, uint64_t i, uint64_t frames)
{
    uint64_t pfn = i - c->base;
    int failed = cache_show(c, pfn, frames);
    if (!failed)
        failed = device_write(c->device, pfn, frames, c->pool + pfn * PAGE);
    if (failed)
        __atomic_fetch_add(&c->header->errors, 1, __ATOMIC_RELAXED);
    else
        __atomic_fetch_add(&c->header->written, frames, __ATOMIC_RELAXED);
    return failed;
}

/* Let go of held victims, ascending; returns how many had to stay, since they could not be written back. */
static uint32_t let_go(struct cache *c, uint64_t *victims, uint64_t *flags, uint32_t count)
{
    uint64_t stored[BATCH];
    uint32_t writers = 0, stayed = 0;
    for (uint32_t n = 0; n < count; n++)
        if (flags[n] & F_WRITABLE)
            stored[writers++] = victims[n];
    if (writers && stop_stores(c, stored, writers)) {
        uint32_t left = 0;
        for (uint32_t n = 0; n < count; n++)
            if (flags[n] & F_WRITABLE) {
                frame_release(c, victims[n], flags[n]);
                stayed++;
            } else {
                victims[left] = victims[n];
                flags[left++] = flags[n];
            }
        count = left;
    }
    STEP(AT_STORES_STOPPED);
    for (uint32_t n = 0, run; n < count; n += run) {
        run = 1;
        uint64_t dirty = flags[n] & F_DIRTY;
        while (n + run < count && victims[n + run] == victims[n] + run && (flags[n + run] & F_DIRTY) == dirty)
            run++;
        if (dirty && frames_write(c, victims[n], run)) {
            for (uint32_t k = n; k < n + run; k++)
                frame_release(c, victims[k], flags[k]);
            stayed += run;
            continue;
        }
        for (uint32_t k = n; k < n + run; k++)
            frame_note(c, victims[k], 0); /* the block is the truth: who takes over punches the frame */
        STEP(AT_WRITTEN_BACK);
        frames_punch(c, victims[n], run);
        STEP(AT_PUNCHED);
        __atomic_fetch_add(&c->header->evicted, run, __ATOMIC_RELAXED);
        for (uint32_t k = n; k < n + run; k++) {
            frame_left(c, flags[k]);
            frame_release(c, victims[k], now(c) << F_STAMP);
        }
    }
    return stayed;
}

/* Whether we may evict a frame that says this: of other pools only what is clean, since their devices aren't ours to write to. */
static int is_ours_to_evict(const struct cache *c, uint64_t i, uint64_t flags)
{
    if (!(flags & F_RESIDENT) || flags & F_KEPT)
        return 0;
    return !(flags & F_DIRTY) || (!c->read_only && frame_is_block(c, i) && (!(flags & F_WRITABLE) || (c->engine && !is_stuck(c))));
}

/* Look at frames from `i` on, until `want` are held, or `most` have been looked at; returns how many. */
static uint64_t gather(const struct cache *c, uint64_t i, uint64_t most, int late, uint64_t *victims, uint64_t *flags, uint64_t want,
                       uint32_t *count)
{
    uint64_t n = 0;
    for (*count = 0; n < most && *count < want; n++, i++) {
        uint64_t seen = __atomic_load_n(&c->words[i], __ATOMIC_SEQ_CST), keep = seen;
        if (seen & F_HOLDER) {
            uint64_t left;
            if (late && frame_hold(c, i, 0, &left)) /* its holder is dead, or was just about to release it */
                frame_release(c, i, left);
            continue;
        }
        if (!is_ours_to_evict(c, i, seen))
            continue;
        if (!is_victim(c, &keep, late)) {
            if (keep != seen &&
                __atomic_compare_exchange_n(&c->words[i], &seen, keep, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) && (keep & ~seen) & F_MAIN)
                __atomic_fetch_add(&c->header->mains, 1, __ATOMIC_RELAXED);
        } else if (frame_hold(c, i, 0, &flags[*count])) {
            if (is_ours_to_evict(c, i, flags[*count]))
                victims[(*count)++] = i;
            else
                frame_release(c, i, flags[*count]); /* it changed at that moment */
        }
    }
    return n;
}

/*
 * Evict `want` frames, or as many as can be, and a few more: neighbours are written and punched together. What the caller holds stays.
 * The hand is moved after the look: two processes may look at the same frames at the same time, and take different ones.
 */
uint64_t frames_evict(struct cache *c, uint64_t want)
{
    uint64_t victims[BATCH], flags[BATCH], length = sweep_length(c), few = c->header->limit / 128;
    uint64_t more = want + (few < BATCH ? few : BATCH);
    uint64_t errors = __atomic_load_n(&c->header->errors, __ATOMIC_RELAXED);
    int refused = 0;
    for (uint64_t swept = 0; want && swept < LAPS * length;) {
        uint64_t left, position = __atomic_load_n(&c->header->hand, __ATOMIC_SEQ_CST) % length, i = sweep_place(c, position, &left);
        uint32_t count, gone;
        if (left > 8 * BATCH)
            left = 8 * BATCH;
        uint64_t looked = gather(c, i, left, swept >= length, victims, flags, more < BATCH ? more : BATCH, &count);
        __atomic_store_n(&c->header->hand, position + looked, __ATOMIC_SEQ_CST);
        swept += looked;
        if (!count)
            continue;
        gone = count - let_go(c, victims, flags, count);
        refused = gone || __atomic_load_n(&c->header->errors, __ATOMIC_RELAXED) == errors ? 0 : refused + 1;
        if (refused == REFUSALS)
            break;
        want -= gone < want ? gone : want;
        more -= gone < more ? gone : more;
    }
    return want;
}
