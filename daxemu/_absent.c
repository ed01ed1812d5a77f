/* See _cache.h for the contract. A touch of a frame that has no page: the SIGBUS handler's part. */
#define _GNU_SOURCE
#include "_cache.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static __thread char *beyond; /* the last touch behind the end of a file: the second one is the program's */
static __thread char *unknown; /* the last one of nothing of ours; also of a cache that was closed at that moment: the same */

static size_t put_text(char *line, size_t at, const char *text)
{
    size_t size = strlen(text);
    memcpy(line + at, text, size);
    return at + size;
}

static size_t put_number(char *line, size_t at, uint64_t number)
{
    char digits[20];
    int n = 0;
    do
        digits[n++] = (char)('0' + number % 10);
    while (number /= 10);
    while (n)
        line[at++] = digits[--n];
    return at;
}

static void complain(const struct region *r, uint64_t page, uint64_t block)
{
    char line[160];
    const struct space *s = &r->engine->spaces[r->space];
    size_t at = put_text(line, 0, "onecopy: the device could not read block ");
    at = put_number(line, at, block);
    at = put_text(line, at, ", page ");
    at = put_number(line, at, page);
    at = put_text(line, at, " of inode ");
    at = put_number(line, at, s->subvolume);
    line[at++] = ':';
    at = put_number(line, at, s->inode);
    at = put_text(line, at, "\n");
    if (write(2, line, at) < 0) {
        /* nowhere to complain to */
    }
}

/*
 * The pool's own mapping: whoever reads it looks at what it finds (S10), and asks for errors before it believes it. So a block that
 * can't be read is shown as a page of zeros, for now, and remembered: `losses` says whether that happened while somebody read, in
 * whatever thread, since all see the zeros; see cache_losses in _cache_type.c.
 */
static int absent_block(struct cache *c, uint64_t pfn)
{
    int failed = cache_need(c, c->base + pfn, pfn, 1, NULL);
    if (!failed)
        return 0;
    guard_lock();
    if (!(__atomic_load_n(&c->words[c->base + pfn], __ATOMIC_SEQ_CST) & F_RESIDENT)) { /* else it could be read, by another */
        __atomic_fetch_add(&c->losses, 1, __ATOMIC_SEQ_CST);
        if (mmap(c->pool + pfn * PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
            failed = -1;
        else {
            c->failed_block = pfn;
            c->failed = failed;
            if (!(c->lost[pfn / 8] >> pfn % 8 & 1))
                __atomic_fetch_add(&c->shown, 1, __ATOMIC_SEQ_CST);
            c->lost[pfn / 8] |= (uint8_t)(1u << pfn % 8);
        }
        __atomic_fetch_add(&c->losses, 1, __ATOMIC_SEQ_CST);
        /* Somebody may have filled and held it since we looked; who looks for lost pages then sees ours. */
    }
    guard_unlock();
    return failed < 0 ? failed : 0;
}

static int show(struct cache *c, uint64_t pfn)
{
    char *at = c->pool + pfn * PAGE;
    if (mmap(at, PAGE, PROT_NONE, MAP_SHARED | MAP_FIXED, c->frames_fd, (off_t)((c->base + pfn) * PAGE)) == MAP_FAILED)
        return errno;
    int failed = cache_watch(c, at, PAGE);
    if (!failed && mprotect(at, PAGE, PROT_READ | PROT_WRITE))
        failed = errno;
    if (!failed) {
        c->lost[pfn / 8] &= (uint8_t)~(1u << pfn % 8);
        __atomic_fetch_sub(&c->shown, 1, __ATOMIC_SEQ_CST);
    }
    return failed;
}

int cache_show(struct cache *c, uint64_t pfn, uint64_t pages)
{
    int failed = 0;
    if (!__atomic_load_n(&c->shown, __ATOMIC_SEQ_CST))
        return 0;
    guard_lock();
    for (uint64_t end = pfn + pages; pfn < end && !failed; pfn++) {
        if (!(pfn % 8) && end - pfn >= 8 && !c->lost[pfn / 8])
            pfn += 7;
        else if (c->lost[pfn / 8] >> pfn % 8 & 1)
            failed = show(c, pfn);
    }
    guard_unlock();
    return failed;
}

int cache_show_page(struct cache *c, const char *address)
{
    uint64_t pfn = (uint64_t)(address - c->pool) / PAGE;
    if (c->uffd < 0)
        return -1;
    if (!(c->lost[pfn / 8] >> pfn % 8 & 1))
        return 0; /* it was being shown again */
    int failed = show(c, pfn);
    return failed ? failed : __atomic_load_n(&c->words[c->base + pfn], __ATOMIC_SEQ_CST) & F_RESIDENT ? 0 : EIO;
}

/* How many blocks to read at once: more and more while a mapping is read in turn. Under the guard. */
static uint64_t read_ahead(struct region *r, const uint64_t *entries, uint64_t page)
{
    const struct cache *c = r->engine->cache;
    uint64_t frames = 1, word = entries[page], end = r->engine->spaces[r->space].pages;
    r->ahead = page == r->read_end ? (r->ahead ? r->ahead * 2 : 4) : 1;
    if (r->ahead > AHEAD)
        r->ahead = AHEAD;
    if (end > r->pages)
        end = r->pages;
    while (frames < r->ahead && page + frames < end) {
        uint64_t next = __atomic_load_n(&entries[page + frames], __ATOMIC_ACQUIRE);
        if ((next & PFN_MASK) != (word & PFN_MASK) + frames || next & BEYOND ||
            cache_frame(c, r->space, page + frames, next) != cache_frame(c, r->space, page, word) + frames)
            break;
        frames++;
    }
    r->read_end = page + frames;
    return frames;
}

int absent(char *address)
{
    fault_enter();
    guard_lock();
    struct cache *pool = cache_around(address);
    struct region *r = pool ? NULL : region_at(address);
    int failed = -1;
    if (pool) {
        guard_unlock();
        failed = absent_block(pool, (uint64_t)(address - pool->pool) / PAGE);
        fault_leave();
        return failed;
    }
    struct engine *e = r ? r->engine : NULL;
    const uint64_t *entries = e && e->cache && e->alive ? entries_of(e, r->space) : NULL;
    uint64_t page = r ? (uint64_t)(address - r->address) / PAGE : 0;
    if (entries && page >= e->spaces[r->space].pages)
        entries = NULL;
    uint64_t word = entries ? __atomic_load_n(&entries[page], __ATOMIC_ACQUIRE) : 0;
    if (word & PFN_MASK && !(word & BEYOND)) {
        struct cache *c = e->cache;
        uint64_t i = cache_frame(c, r->space, page, word), ahead = read_ahead(r, entries, page);
        int there = (__atomic_load_n(&c->words[i], __ATOMIC_SEQ_CST) & (F_RESIDENT | F_HOLDER)) == F_RESIDENT;
        if (there)
            failed = map_around(r, page); /* the page had moved, and what we show here is where it was */
        else {
            guard_unlock();
            failed = cache_need(c, i, word & PFN_MASK, ahead, i == c->base + (word & PFN_MASK) ? NULL : entries + page);
            guard_lock();
        }
        if (failed && (r = region_at(address)))
            complain(r, page, word & PFN_MASK);
    } else if (entries && (!(word & BEYOND) || beyond != address)) {
        /* What we show is a page that the file has lost, and nobody has told us yet; its frame is gone already. Behind the end that
         * is a SIGBUS, once it is mapped so: the next one. */
        beyond = word & BEYOND ? address : NULL;
        failed = map_around(r, page);
    } else {
        beyond = NULL;
        if (!r && unknown != address)
            failed = 0;
        unknown = failed ? NULL : address;
    }
    guard_unlock();
    fault_leave();
    return failed;
}
