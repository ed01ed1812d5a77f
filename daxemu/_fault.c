/* See _fault.h for the contract. The write fault: a store to a shared page gives the file pages of its own. */
#define _GNU_SOURCE
#include "_cache.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define LEVELS 8
#define REPEATS 3

/* Of SIGSEGV, and of SIGBUS, which a cache needs. */
static struct chain {
    struct sigaction found[LEVELS]; /* the handlers that were there before ours, each time that it was put in front */
    int levels;
} chains[2];
static __thread struct {
    int passed; /* levels below the handler that this thread's last fault was passed to */
    void *last_address, *last_place; /* of that fault, and how often it has come in a row */
    int repeated;
} threads[2];
static __thread int raised; /* a SIGBUS that we sent is on its way */

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

/* First of `pages` free frames in a row, aligned to `step`, from `from` on and then from the start; 0: none. */
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
    for (int failed; e->cache && low < high; low++, pfn++)
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

static int fault_page(struct engine *e, uint32_t space, uint64_t page, uint64_t granule, uint64_t holes, uint64_t *high)
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
        if (!failed)
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

/* ------------------------------------------------------------- handler */

static void say(const char *text)
{
    if (write(2, text, strlen(text)) < 0) {
        /* nobody listens */
    }
}

/* As the kernel does for a fault that it can't resolve: the signal comes even where it is blocked or ignored. */
static void raise_bus_error(void *address, ucontext_t *context)
{
    struct sigaction have;
    if (!sigaction(SIGBUS, NULL, &have) && (have.sa_handler == SIG_IGN || sigismember(&context->uc_sigmask, SIGBUS))) {
        memset(&have, 0, sizeof have);
        have.sa_handler = SIG_DFL;
        sigaction(SIGBUS, &have, NULL);
    }
    sigdelset(&context->uc_sigmask, SIGBUS);
    siginfo_t info;
    memset(&info, 0, sizeof info);
    info.si_signo = SIGBUS;
    info.si_code = BUS_ADRERR;
    info.si_addr = address;
    raised = 1;
    syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), SIGBUS, &info);
}

static void *place_of(const void *context)
{
#ifdef __x86_64__
    return (void *)((const ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
#else
    (void)context;
    return NULL;
#endif
}

/*
 * Not ours: as if we weren't there. A handler that had us in front of it, and is in front of us, too, because it was installed and
 * we again: faulthandler restores what it had found - us - and raises the signal anew. That one goes to the level below it.
 */
static void pass_on(int signal, siginfo_t *info, void *context)
{
    struct chain *chain = &chains[signal == SIGBUS];
    int *passed = &threads[signal == SIGBUS].passed, level = *passed ? *passed : chain->levels;
    if (info->si_code > 0) {
        void *place = place_of(context);
        int n = signal == SIGBUS;
        threads[n].repeated = info->si_addr == threads[n].last_address && place == threads[n].last_place ? threads[n].repeated + 1 : 0;
        threads[n].last_address = info->si_addr;
        threads[n].last_place = place;
        level = chain->levels - threads[n].repeated / REPEATS;
    }
    struct sigaction to = {.sa_handler = SIG_DFL};
    if (level > 0)
        to = chain->found[level - 1];
    *passed = level > 0 ? level - 1 : 0;
    if (!(to.sa_flags & SA_SIGINFO) && (to.sa_handler == SIG_DFL || to.sa_handler == SIG_IGN)) {
        struct sigaction standard;
        if (to.sa_handler == SIG_IGN && info->si_code <= 0)
            return; /* sent by kill(2), and ignored; a fault can't be */
        memset(&standard, 0, sizeof standard);
        standard.sa_handler = SIG_DFL;
        sigaction(signal, &standard, NULL);
        if (info->si_code <= 0) /* it does not come again by itself */
            syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), signal);
        return;
    }
    sigset_t mask = ((ucontext_t *)context)->uc_sigmask, ours;
    for (int n = 1; n < 32; n++)
        if (sigismember(&to.sa_mask, n))
            sigaddset(&mask, n);
    if (!(to.sa_flags & SA_NODEFER))
        sigaddset(&mask, signal);
    if (level > 0 && to.sa_flags & (int)SA_RESETHAND) {
        chain->found[level - 1].sa_handler = SIG_DFL;
        chain->found[level - 1].sa_flags = 0;
    }
    pthread_sigmask(SIG_SETMASK, &mask, &ours);
    if (to.sa_flags & SA_SIGINFO)
        to.sa_sigaction(signal, info, context);
    else
        to.sa_handler(signal);
    pthread_sigmask(SIG_SETMASK, &ours, NULL);
}

static int is_store(const ucontext_t *context)
{
#ifdef __x86_64__
    return (context->uc_mcontext.gregs[REG_ERR] & 2) != 0;
#else
    (void)context;
    return 1;
#endif
}

static int fault(char *address, int store)
{
    uint64_t page, granule, holes, high = 0;
    fault_enter();
    guard_lock();
    struct region *r = region_at(address);
    int failed = -1, crowded = 0;
    if (r && r->engine->alive) {
        struct engine *e = r->engine;
        uint32_t space = r->space;
        page = (uint64_t)(address - r->address) / PAGE;
        if (!store)
            failed = map_around(r, page);
        else if (r->writable) {
            if (r->streak == page && page && !r->fixed && r->granule < MOST)
                r->granule *= 2; /* in turn: where the last granule ended */
            else if (r->streak != page && !r->fixed)
                r->granule = FEW;
            holes = r->granule > FEW || r->fixed ? r->granule : 1;
            crowded = too_many_maps();
            if (crowded == 2)
                evict(r);
            granule = crowded == 2 ? BLOCK : crowded && r->granule < 64 && !r->fixed ? 64 : r->granule;
            guard_unlock();
            failed = fault_page(e, space, page, granule, holes, &high);
            guard_lock();
            r = region_at(address);
            if (r)
                r->streak = high;
        }
    }
    guard_unlock();
    fault_leave();
    return failed;
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    int before = errno, failed = -1;
    if (signal == SIGBUS && raised)
        raised = 0;
    else if (info->si_code > 0)
        failed = signal == SIGBUS ? absent(info->si_addr) : fault(info->si_addr, is_store(context));
    if (failed > 0 && signal == SIGSEGV) {
        say(failed == EFAULT   ? "onecopy: a store beyond the end of a mapped file\n"
            : failed == ENOSPC ? "onecopy: a store to a shared page, and the pool has no room for a copy of it; map with reserve=True "
                                 "to have that said at map time\n"
            : failed == EIO    ? "onecopy: a store to a page whose block the device could not read\n"
                               : "onecopy: a mapped page could not be provided (vm.max_map_count, or the pool's host)\n");
        raise_bus_error(info->si_addr, context);
    } else if (failed)
        pass_on(signal, info, context);
    errno = before;
}

/* Put our handler in front, if it isn't; what is there now gets the faults that aren't ours. */
int handler_install(int signal)
{
    struct sigaction have, ours;
    struct chain *chain = &chains[signal == SIGBUS];
    if (sigaction(signal, NULL, &have))
        return errno;
    if (have.sa_flags & SA_SIGINFO && have.sa_sigaction == on_fault)
        return 0;
    if (chain->levels == LEVELS) {
        memmove(chain->found, chain->found + 1, sizeof chain->found - sizeof *chain->found);
        chain->levels--;
    }
    chain->found[chain->levels++] = have;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigfillset(&ours.sa_mask);
    return sigaction(signal, &ours, NULL) ? errno : 0;
}

int handler_needed(int signal)
{
    return chains[signal == SIGBUS].levels > 0;
}
