/* See _fault.h for the contract. A process's regions, and what they show. */
#define _GNU_SOURCE
#include "_cache.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static struct region **regions;  /* ascending by address: what the handler looks in */
static size_t region_count, region_room;
static uint64_t maps, maps_limit; /* estimate of this process's mappings, never too low; and what we allow ourselves */
static uint64_t maps_counted;     /* what the last count found */
static int maps_evicted;          /* an eviction came before it */

/* ------------------------------------------------------------- windows */

static char *window_of(struct engine *e, uint32_t space)
{
    char *have = __atomic_load_n(&e->window[space], __ATOMIC_ACQUIRE);
    if (have)
        return have;
    size_t size = LOCKS + MAX_PAGES * 8;
    char *mine = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, e->runtime_fd,
                      (off_t)(e->windows + space * WINDOW));
    if (mine == MAP_FAILED)
        return NULL;
    if (!__atomic_compare_exchange_n(&e->window[space], &have, mine, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        munmap(mine, size);
        return have;
    }
    return mine;
}

uint64_t *entries_of(struct engine *e, uint32_t space)
{
    char *window = window_of(e, space);
    return window ? (uint64_t *)(window + LOCKS) : NULL;
}

uint64_t *locks_of(struct engine *e, uint32_t space)
{
    return (uint64_t *)window_of(e, space);
}

/* ------------------------------------------------------------- mapping */

static void count_maps(void)
{
    char buffer[1024]; /* small: an alternate signal stack may be */
    uint64_t lines = 0;
    ssize_t got;
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        while ((got = read(fd, buffer, sizeof buffer)) > 0)
            for (ssize_t i = 0; i < got; i++)
                lines += buffer[i] == '\n';
        close(fd);
    }
    if (!maps_limit) {
        uint64_t limit = 65530;
        fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);
        if (fd >= 0) {
            got = read(fd, buffer, sizeof buffer - 1);
            if (got > 0) {
                limit = 0;
                for (ssize_t i = 0; i < got && buffer[i] >= '0' && buffer[i] <= '9'; i++)
                    limit = limit * 10 + (uint64_t)(buffer[i] - '0');
            }
            close(fd);
        }
        maps_limit = limit / 4 * 3; /* the rest is for the program's own: its allocator needs mappings, too */
        if (maps_evicted && lines > maps_limit) /* they are all the program's: we share what is left with it */
            maps_limit = lines < limit ? lines + (limit - lines) / 2 : limit;
        maps_evicted = 0;
    }
    maps = maps_counted = lines;
}

/* The VMA budget: 0 while there is plenty, 1 when faults should copy more at once, 2 when this process has too many. */
int too_many_maps(void)
{
    /* The estimate knows of no merging and no unmapping: counted anew each time that it has grown a good deal. */
    if (!maps_limit || (maps > maps_limit / 2 && maps > maps_counted + maps_limit / 16))
        count_maps();
    return maps > maps_limit ? 2 : maps > maps_limit / 2;
}

/*
 * Frames of a cache: first where nobody can touch them, since a touch of one that is absent, unwatched, would give it a page of
 * zeros. For storing only those of which _cache.h says that they may be.
 */
static int map_cached(struct region *r, char *at, uint64_t page, uint64_t pages, uint64_t word, int writable)
{
    struct cache *c = r->engine->cache;
    uint64_t i = cache_frame(c, r->space, page, word), pfn = word & PFN_MASK;
    if (mmap(at, pages * PAGE, PROT_NONE, MAP_SHARED | MAP_FIXED, c->frames_fd, (off_t)(i * PAGE)) == MAP_FAILED)
        return errno;
    int failed = cache_watch(c, at, pages * PAGE);
    for (uint64_t n = 0, run; n < pages && !failed; n += run) {
        int store = writable && cache_may_write(c, pfn + n);
        for (run = 1; n + run < pages && (store == (writable && cache_may_write(c, pfn + n + run))); run++)
            ;
        failed = mprotect(at + n * PAGE, run * PAGE, PROT_READ | (store ? PROT_WRITE : 0)) ? errno : 0;
    }
    return failed;
}

/*
 * A private page is mapped writable (`stores`) only by who holds its block, with everybody's answers: a peer that could store as soon
 * as it is told would do so before others are, and they would still show the old bytes (S3). Its first store there faults instead,
 * and waits for the block.
 */
static int map_pages(struct region *r, uint64_t page, uint64_t pages, uint64_t word, int stores)
{
    char *at = r->address + page * PAGE;
    void *got;
    maps += 2;
    if (word & BEYOND)
        got = mmap(at, pages * PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, r->engine->end_fd, 0);
    else if (!(word & PFN_MASK))
        got = mmap(at, pages * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    else {
        int writable = stores && r->writable && word & PRIVATE;
        if (r->engine->cache)
            return map_cached(r, at, page, pages, word, writable);
        got = mmap(at, pages * PAGE, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | MAP_FIXED, r->engine->pool_fd,
                   (off_t)((word & PFN_MASK) * PAGE));
        /* Stores are about to come: one look maps all that lies in its 64 KiB (measured: half the price of MAP_POPULATE). */
        for (char *look = at, *end = at + pages * PAGE; writable && got != MAP_FAILED && pages <= BLOCK && look < end;
             look += 16 * PAGE - (uintptr_t)look % (16 * PAGE))
            (void)*(volatile char *)look;
    }
    return got == MAP_FAILED ? errno : 0;
}

/* Let go of all translations of a region: every touch faults and maps what is around it (map_around). */
void evict(struct region *r)
{
    mmap(r->address, r->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    r->evicted = 1;
    maps_limit = 0; /* counted anew at the next look */
    maps_evicted = 1;
}

static int continues(struct region *r, uint64_t word, uint64_t next, uint64_t by)
{
    if ((word ^ next) & BEYOND || ((r->writable || r->engine->cache) && (word ^ next) & PRIVATE))
        return 0;
    uint64_t pfn = word & PFN_MASK;
    return (next & PFN_MASK) == (pfn && !(word & BEYOND) ? pfn + by : pfn);
}

static int map_entries(struct region *r, const uint64_t *entries, uint64_t low, uint64_t high, int stores)
{
    if (high > r->pages)
        high = r->pages;
    while (low < high) {
        uint64_t word = __atomic_load_n(&entries[low], __ATOMIC_ACQUIRE), end = low + 1;
        while (end < high && continues(r, word, __atomic_load_n(&entries[end], __ATOMIC_ACQUIRE), end - low))
            end++;
        int failed = map_pages(r, low, end - low, word, stores);
        if (failed) { /* ENOMEM: too many mappings; this one now, the others when they are touched */
            evict(r);
            return map_pages(r, low, end - low, word, stores);
        }
        low = end;
    }
    return 0;
}

int map_around(struct region *r, uint64_t page)
{
    const uint64_t *entries = entries_of(r->engine, r->space);
    if (!entries || page >= r->engine->spaces[r->space].pages)
        return ENOMEM;
    uint64_t low = page, first = page / BLOCK * BLOCK, high = page + 1, end = first + BLOCK;
    if (end > r->pages)
        end = r->pages;
    uint64_t word = __atomic_load_n(&entries[page], __ATOMIC_ACQUIRE);
    while (high < end && continues(r, word, __atomic_load_n(&entries[high], __ATOMIC_ACQUIRE), high - page))
        high++;
    for (uint64_t before; low > first; low--, word = before) {
        before = __atomic_load_n(&entries[low - 1], __ATOMIC_ACQUIRE);
        if (!continues(r, before, word, 1))
            break;
    }
    if (too_many_maps() == 2)
        evict(r);
    return map_pages(r, low, high - low, word, 0);
}

int map_region(struct region *r, uint64_t low, uint64_t high)
{
    const uint64_t *entries = entries_of(r->engine, r->space);
    int failed = entries ? 0 : ENOMEM;
    while (low < high && !failed) { /* piece by piece: the guard keeps this process's faults waiting */
        uint64_t end = low + 8 * BLOCK < high ? low + 8 * BLOCK : high;
        sigset_t before;
        guard_enter(&before);
        int crowded = too_many_maps() == 2;
        if (crowded)
            evict(r); /* all that is left to do is done when pages are touched */
        else
            failed = map_entries(r, entries, low, end, 0);
        guard_leave(&before);
        low = crowded ? high : end;
    }
    return failed;
}

int refresh(struct engine *e, uint32_t space, uint64_t low, uint64_t high, int stores)
{
    const uint64_t *entries = entries_of(e, space);
    int failed = entries ? 0 : ENOMEM;
    guard_lock();
    struct region *first = e->chain[space];
    for (struct region *r = first; r && first->next && stores && !failed; r = r->next) /* no region may lag behind another's stores */
        failed = map_entries(r, entries, low, high, 0);
    for (struct region *r = first; r && !failed; r = r->next)
        failed = map_entries(r, entries, low, high, stores);
    guard_unlock();
    return failed;
}

int protect(struct engine *e, uint32_t space, uint64_t low, uint64_t high)
{
    guard_lock();
    for (struct region *r = e->chain[space]; r; r = r->next) {
        uint64_t end = high < r->pages ? high : r->pages;
        /* What an eviction has unmapped must stay so: protecting it would show zeros. */
        if (r->writable && low < end && (r->evicted || mprotect(r->address + low * PAGE, (end - low) * PAGE, PROT_READ)))
            evict(r);
    }
    guard_unlock();
    return 0;
}

/* A space without entries: the published transaction's log says where its pages are now. */
int apply_log(struct engine *e, uint32_t space)
{
    int failed = 0;
    guard_lock();
    for (struct region *r = e->chain[space]; r; r = r->next)
        for (uint64_t i = 0, count = log_is_published(e) ? log_runs(e) : 0; i < count && !failed; i++) {
            const struct run *run = &e->log[i];
            if ((uint32_t)run->space == space && !(run->space & ZERO) && run->page < r->pages) {
                uint64_t end = run->page + run->pages < r->pages ? run->page + run->pages : r->pages;
                failed = map_pages(r, run->page, end - run->page, run->word, 0);
                if (failed)
                    evict(r); /* better no page than an old one */
            }
        }
    guard_unlock();
    return failed;
}

/* ------------------------------------------------------------- regions */

static size_t region_place(const char *address)
{
    size_t low = 0, high = region_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (regions[middle]->address <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct region *region_at(const char *address)
{
    size_t place = region_place(address);
    if (!place)
        return NULL;
    struct region *r = regions[place - 1];
    return address < r->address + r->pages * PAGE ? r : NULL;
}

void region_add(struct region *r)
{
    sigset_t before;
    guard_enter(&before);
    if (region_count == region_room) {
        size_t room = region_room ? 2 * region_room : 64;
        struct region **more = realloc(regions, room * sizeof *more);
        if (!more)
            abort();
        regions = more;
        region_room = room;
    }
    size_t place = region_place(r->address);
    memmove(regions + place + 1, regions + place, (region_count - place) * sizeof *regions);
    regions[place] = r;
    region_count++;
    r->next = r->engine->chain[r->space];
    __atomic_store_n(&r->engine->chain[r->space], r, __ATOMIC_RELAXED);
    guard_leave(&before);
}

void region_remove(struct region *r)
{
    sigset_t before;
    guard_enter(&before);
    size_t place = region_place(r->address) - 1;
    memmove(regions + place, regions + place + 1, (region_count - place - 1) * sizeof *regions);
    region_count--;
    for (struct region **at = &r->engine->chain[r->space]; *at; at = &(*at)->next)
        if (*at == r) {
            __atomic_store_n(at, r->next, __ATOMIC_RELAXED);
            break;
        }
    guard_leave(&before);
}

void evict_all(struct engine *e)
{
    for (size_t i = 0; i < region_count; i++)
        if (regions[i]->engine == e)
            evict(regions[i]);
}
