/* See _fault.h for the contract. The write fault: a store to a shared page gives the file pages of its own. */
#define _GNU_SOURCE
#include "_cache.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

/* -------------------------------------------------------------- frames */

/* Take frames that are free, all or none; each byte by compare-and-swap, as handlers and the allocator take them at the same time.
 * Returns 0, or 1, or 2 when all of them have storage. */
int claim(struct engine *e, uint64_t pfn, uint64_t pages, uint8_t state)
{
    uint8_t all = BACKED;
    for (uint64_t i = 0; i < pages; i++) {
        uint8_t seen = __atomic_load_n(&e->table[pfn + i], __ATOMIC_RELAXED);
        while (!(seen & (uint8_t)~BACKED) &&
               !__atomic_compare_exchange_n(&e->table[pfn + i], &seen, state, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            ;
        if (seen & (uint8_t)~BACKED) {
            while (i--)
                __atomic_store_n(&e->table[pfn + i], 0, __ATOMIC_SEQ_CST);
            return 0;
        }
        all &= seen;
    }
    return all ? 2 : 1;
}

typedef uint64_t __attribute__((may_alias)) eight; /* bytes of the table at a time */

static int is_free(const struct engine *e, uint64_t pfn, uint64_t pages)
{
    const uint8_t *at = e->table + pfn;
    for (; pages && (uintptr_t)at % 8; at++, pages--)
        if (__atomic_load_n(at, __ATOMIC_RELAXED) & (uint8_t)~BACKED)
            return 0;
    for (; pages >= 8; at += 8, pages -= 8)
        if (__atomic_load_n((const eight *)at, __ATOMIC_RELAXED) & 0x7f7f7f7f7f7f7f7full)
            return 0;
    for (; pages; at++, pages--)
        if (__atomic_load_n(at, __ATOMIC_RELAXED) & (uint8_t)~BACKED)
            return 0;
    return 1;
}

/* First of `pages` free frames in a row, aligned to `step`, from `from` on and then from the start, and a single one where there
 * is no other among the nodes, too; 0: none. */
static uint64_t search(const struct engine *e, uint64_t pages, uint64_t step, uint64_t from)
{
    uint64_t limit = __atomic_load_n(e->floor, __ATOMIC_RELAXED);
    if (limit > e->frames)
        limit = e->frames;
    from -= from % step;
    for (int round = 0; round < 2; round++) {
        for (uint64_t at = round ? 0 : from, end = round ? from : limit; at < end && at + pages <= limit; at += step)
            if (is_free(e, at, pages))
                return at; /* never 0: the pool's header is in use */
    }
    for (uint64_t at = limit; pages == 1 && at < e->frames; at++)
        if (is_free(e, at, 1))
            return at;
    return 0;
}

/* Claim frames for pages [low, *high) of a file: beside what the block has for itself, so that neighbours become one mapping; else
 * at the start of a window of free frames that lies as the block does in the file; else anywhere, and fewer. */
static uint64_t take_frames(struct engine *e, const uint64_t *entries, uint64_t pages, uint64_t low, uint64_t *high, int *backed)
{
    int got = 0;
    struct counters *c = e->counters;
    uint64_t want = *high - low, block = low / BLOCK * BLOCK, end = block + BLOCK < pages ? block + BLOCK : pages;
    int64_t room = (int64_t)*e->free - __atomic_load_n(&c->held, __ATOMIC_SEQ_CST) - (int64_t)e->reserve;
    if (room < (int64_t)want)
        want = room > 0 ? 1 : 0;
    if (!want)
        return 0;
    uint64_t pfn = 0, near = 0;
    for (uint64_t by = 1; by < BLOCK && !near; by++) {
        if (low >= block + by && entries[low - by] & PRIVATE)
            near = (entries[low - by] & PFN_MASK) + by;
        else if (low + by < end && entries[low + by] & PRIVATE && (entries[low + by] & PFN_MASK) > by)
            near = (entries[low + by] & PFN_MASK) - by;
    }
    if (near && near + want <= e->frames && is_free(e, near, want) && (got = claim(e, near, want, HELD)))
        pfn = near;
    if (!pfn && !near && e->frames >= 4 * BLOCK) {
        uint64_t window = search(e, BLOCK, BLOCK, __atomic_load_n(&c->hint, __ATOMIC_RELAXED));
        if (window) {
            __atomic_store_n(&c->hint, window + BLOCK, __ATOMIC_RELAXED);
            if ((got = claim(e, window + low % BLOCK, want, HELD)))
                pfn = window + low % BLOCK;
        }
    }
    for (; !pfn && want; want /= 2)
        for (;;) {
            uint64_t at = search(e, want, want >= 8 ? 8 : 1, __atomic_load_n(&c->hint, __ATOMIC_RELAXED));
            if (!at)
                break;
            if ((got = claim(e, at, want, HELD))) {
                pfn = at;
                goto taken;
            }
        }
taken:
    if (pfn) {
        __atomic_fetch_add(&c->held, (int64_t)want, __ATOMIC_SEQ_CST);
        *high = low + want;
    }
    *backed = got == 2;
    return pfn;
}

/* Fill frames with what pages [low, high) show now. By system call where one has no storage: it gets it, or ENOSPC says so. */
static int copy_pages(struct engine *e, const uint64_t *entries, uint64_t low, uint64_t high, uint64_t pfn, int backed)
{
    static const char zeros[16 * PAGE];
    int failed = e->cache && !backed ? device_reserve(e->cache->device, pfn, high - low) : 0;
    if (failed)
        return failed;
    for (; e->cache && low < high; low++, pfn++)
        if ((failed = cache_copy(e->cache, entries[low] & PFN_MASK, pfn)))
            return failed;
    while (low < high) {
        uint64_t from = entries[low] & PFN_MASK, count = 1;
        while (low + count < high && (entries[low + count] & PFN_MASK) == (from ? from + count : 0))
            count++;
        if (!from && count > 16)
            count = 16;
        const char *source = from ? e->pool + from * PAGE : zeros;
        if (backed)
            memcpy(e->pool + pfn * PAGE, source, count * PAGE);
        for (uint64_t done = backed ? count * PAGE : 0; done < count * PAGE;) {
            ssize_t got = pwrite(e->pool_fd, source + done, count * PAGE - done, (off_t)(pfn * PAGE + done));
            if (got < 0 && errno != EINTR)
                return errno;
            done += got > 0 ? (uint64_t)got : 0;
        }
        low += count;
        pfn += count;
    }
    return 0;
}

/* --------------------------------------------------------- the sharing */

uint32_t record_take(struct engine *e)
{
    for (;;) {
        uint32_t seen = __atomic_load_n(&e->freed, __ATOMIC_SEQ_CST);
        for (uint32_t i = 0; i < RECORDS - (e->cache != NULL); i++) { /* a cache's evictions have the last one for themselves */
            uint32_t is_free_now = 0;
            if (__atomic_compare_exchange_n(&e->busy[i], &is_free_now, 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
                return e->slot * RECORDS + i;
        }
        futex_wait(&e->freed, seen, 0);
    }
}

void record_give(struct engine *e, uint32_t record)
{
    __atomic_store_n(&e->busy[record % RECORDS], 0, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&e->freed, 1, __ATOMIC_SEQ_CST);
    futex_wake(&e->freed);
}

/* What a store to `entry` and one to `other` have in common: neither is private, and both are data, or holes. */
static int alike(uint64_t entry, uint64_t other)
{
    return !(other & (PRIVATE | BEYOND)) && !(entry & PFN_MASK) == !(other & PFN_MASK);
}

/*
 * Give the file its own pages around `page`: a granule of shared ones, or of a hole, where a page that nobody stores to would be
 * memory for nothing, `holes` pages. [*low, *high) returns what is private now. The block is locked.
 */
static int break_sharing(struct engine *e, uint32_t record, uint32_t space, uint64_t *entries, uint64_t page, uint64_t granule,
                         uint64_t holes, uint64_t *low, uint64_t *high)
{
    struct record *m = &e->records[record];
    struct space *s = &e->spaces[space];
    if (!(entries[page] & PFN_MASK))
        granule = holes;
    uint64_t first = page - page % granule, last = first + granule;
    if (last > s->pages)
        last = s->pages;
    *low = page;
    *high = page + 1;
    while (*low > first && alike(entries[page], entries[*low - 1]))
        --*low;
    while (*high < last && alike(entries[page], entries[*high]))
        ++*high;
    /* From here on, and until the entries name them, our record vouches for the frames: a sweep for strays leaves them alone. */
    __atomic_store_n(&m->count, UINT64_MAX, __ATOMIC_SEQ_CST);
    int backed;
    uint64_t all = *high, pfn = take_frames(e, entries, s->pages, *low, high, &backed);
    if (pfn && *high <= page) { /* fewer than wanted: then for the page itself */
        for (uint64_t i = 0; i < *high - *low; i++)
            __atomic_store_n(&e->table[pfn + i], backed ? BACKED : 0, __ATOMIC_SEQ_CST);
        __atomic_fetch_sub(&e->counters->held, (int64_t)(*high - *low), __ATOMIC_SEQ_CST);
        *low = page;
        *high = all < page + 1 ? all : page + 1;
        pfn = take_frames(e, entries, s->pages, *low, high, &backed);
    }
    if (!pfn) {
        __atomic_store_n(&m->count, 0, __ATOMIC_SEQ_CST);
        return ENOSPC;
    }
    __atomic_store_n(&m->claimed, pfn, __ATOMIC_RELAXED);
    __atomic_store_n(&m->count, *high - *low, __ATOMIC_SEQ_CST);
    STEP(AT_CLAIMED);
    int failed = copy_pages(e, entries, *low, *high, pfn, backed);
    if (failed) {
        for (uint64_t i = 0; i < *high - *low; i++)
            __atomic_store_n(&e->table[pfn + i], backed ? BACKED : 0, __ATOMIC_SEQ_CST);
        __atomic_fetch_sub(&e->counters->held, (int64_t)(*high - *low), __ATOMIC_SEQ_CST);
        __atomic_store_n(&m->count, 0, __ATOMIC_SEQ_CST);
        return failed;
    }
    STEP(AT_COPIED);
    uint64_t strays = 0, dirty = 0;
    for (uint64_t p = *low; p < *high; p++) {
        strays += (entries[p] & DIRTY) != 0; /* frozen, and then stored to before it was folded */
        dirty += !(entries[p] & DIRTY);
        __atomic_store_n(&entries[p], (pfn + p - *low) | PRIVATE | DIRTY, __ATOMIC_SEQ_CST);
        if (p == (*low + *high) / 2)
            STEP(AT_HALF);
    }
    if (e->cache)
        cache_moved(e->cache, space, *low, *high - *low);
    __atomic_store_n(&m->count, 0, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&s->dirty, 1, __ATOMIC_SEQ_CST); /* after the entries: who clears it looks at them then */
    STEP(AT_ENTERED);
    struct counters *c = e->counters;
    __atomic_fetch_add(&c->copied, *high - *low, __ATOMIC_RELAXED);
    __atomic_fetch_add(&c->dirty, dirty, __ATOMIC_RELAXED);
    __atomic_fetch_add(&c->strays, strays, __ATOMIC_RELAXED);
    uint32_t mine = __atomic_add_fetch(&e->dirty, (uint32_t)dirty, __ATOMIC_RELAXED);
    if (e->fold_at && mine >= e->fold_at && mine - dirty < e->fold_at)
        futex_wake(&e->dirty);
    shoot(e, record, space, REMAP, *low, *high, 0, NULL);
    STEP(AT_SHOT);
    return 0;
}

/* Whether the block of `page` is private, complete and in the frames of one huge page: one translation can do for it. */
static int is_huge(struct engine *e, uint32_t space, const uint64_t *entries, uint64_t page)
{
    uint64_t low = page / BLOCK * BLOCK, word = entries[low];
    if (!e->huge || e->spaces[space].pages - low < BLOCK || !(word & PRIVATE) || (word & PFN_MASK) % BLOCK)
        return 0;
    for (uint64_t by = 1; by < BLOCK; by++)
        if (!(entries[low + by] & PRIVATE) || (entries[low + by] & PFN_MASK) != (word & PFN_MASK) + by)
            return 0;
    return 1;
}

int fault_page(struct engine *e, uint32_t space, uint64_t page, uint64_t granule, uint64_t holes, uint64_t *high)
{
    uint64_t *entries = entries_of(e, space), low = page;
    if (!entries)
        return ENOMEM;
    *high = page + 1;
    uint32_t record = record_take(e);
    int failed = block_lock(e, record, space, page / BLOCK);
    if (!failed) {
        STEP(AT_LOCKED);
        if (page >= e->spaces[space].pages || entries[page] & BEYOND)
            failed = EFAULT;
        else if (entries[page] & PRIVATE) {
            uint64_t end = page / BLOCK * BLOCK + BLOCK;
            if (e->cache && end > page + FEW)
                end = page + FEW; /* each of them is about to be resident, and dirty */
            while (*high < end && *high < e->spaces[space].pages && entries[*high] == entries[page] + (*high - page))
                ++*high;
        } else {
            failed = break_sharing(e, record, space, entries, page, granule, holes, &low, high);
            __atomic_fetch_add(&e->counters->faults, 1, __ATOMIC_RELAXED);
        }
        for (uint64_t p = low; e->cache && p < *high && !failed; p++)
            failed = cache_own(e->cache, space, p, entries[p] & PFN_MASK, 1);
        if (!failed && !e->cache && is_huge(e, space, entries, page))
            failed = refresh(e, space, page / BLOCK * BLOCK, page / BLOCK * BLOCK + BLOCK, 1);
        else if (!failed)
            failed = refresh(e, space, low, *high, 1);
        STEP(AT_MAPPED);
        block_unlock(e, space, page / BLOCK);
    }
    record_give(e, record);
    return failed;
}

/* What a store to each page would do; `map`: to those that are private already, too, so that this process can store there. */
int make_private(struct engine *e, uint32_t space, uint64_t low, uint64_t high, int map)
{
    int failed = 0;
    sigset_t before;
    block_signals(&before);
    fault_enter();
    while (low < high && !failed) {
        uint64_t end = low + 1, *entries = entries_of(e, space);
        if (!map && entries && __atomic_load_n(&entries[low], __ATOMIC_ACQUIRE) & PRIVATE) {
            low++;
            continue;
        }
        uint64_t granule = high - low >= BLOCK ? BLOCK : high - low >= 64 ? 64 : 16;
        while (granule > 1 && (low % granule || low + granule > high))
            granule /= 2;
        failed = fault_page(e, space, low, granule, granule, &end);
        low = end;
    }
    fault_leave();
    restore_signals(&before);
    return failed;
}
