/* See _fault.h for the contract. Blocks, freezing, publishing, and what is done about the dead. */
#define _GNU_SOURCE
#include "_cache.h"

#include <errno.h>
#include <string.h>

#define WAITED (1ull << 31)

/*
 * A lock word. Low half: the holder, and whether somebody waits. High half: a dead holder whose work on the block is not
 * finished; it stays until somebody has, however many die over it. A holder is a record + 1, 12 bits, which tells the slot, and the
 * slot's incarnation, 19 bits: the slot may be another process's by now.
 */
static uint32_t holder(uint64_t word)
{
    return (uint32_t)word & (uint32_t)~WAITED;
}

static uint32_t slot_of(uint32_t holder)
{
    return ((holder & 0xfff) - 1) / RECORDS;
}

static uint32_t holder_for(const struct engine *e, uint32_t record)
{
    return (record + 1) | (uint32_t)(e->incarnation & 0x7ffff) << 12;
}

/* A holder without its record: the process. */
static uint64_t process_of(uint32_t holder)
{
    return slot_of(holder) | (uint64_t)(holder >> 12) << 12;
}

static int is_ours(struct engine *e, uint32_t record, uint32_t space, uint64_t block)
{
    return holder(__atomic_load_n(&locks_of(e, space)[block], __ATOMIC_RELAXED)) == holder_for(e, record);
}

static int is_dead(struct engine *e, uint32_t holder)
{
    uint32_t slot = slot_of(holder);
    return (__atomic_load_n(&e->incarnations[slot * 8], __ATOMIC_SEQ_CST) & 0x7ffff) != holder >> 12 || !slot_alive(e, slot);
}

static void apply_block(struct engine *e, uint32_t space, uint64_t *entries, uint64_t block, uint64_t *low, uint64_t *high);

uint64_t log_runs(const struct engine *e)
{
    return __atomic_load_n(e->log_count, __ATOMIC_SEQ_CST);
}

int log_is_published(struct engine *e)
{
    return log_runs(e) &&
           __atomic_load_n(e->log_generation, __ATOMIC_SEQ_CST) <= __atomic_load_n(e->live, __ATOMIC_SEQ_CST);
}

/*
 * The block is ours; its holder died with it. A fault may have entered some of its pages and told nobody, a freeze may not have
 * told everybody: all look again. A commit had published, perhaps, and not applied: its log says what the entries must become.
 * The log counts for this block only if the dead holder is the log's owner. It had locked all its blocks before it published, and
 * it declares the log done before it unlocks any: so what it held while the log counted is what the log is about.
 */
static void repair(struct engine *e, uint32_t record, uint32_t space, uint64_t block)
{
    uint64_t *word = &locks_of(e, space)[block];
    uint64_t *entries = entries_of(e, space), low = block * BLOCK, high = low + BLOCK, from = 0, to = 0;
    if (high > e->spaces[space].pages)
        high = e->spaces[space].pages;
    for (uint64_t page = low; page < high; page++)
        if (entries[page] & FREEZING)
            __atomic_store_n(&entries[page], (entries[page] & ~FREEZING) | PRIVATE, __ATOMIC_SEQ_CST);
    uint64_t dead = process_of((uint32_t)(__atomic_load_n(word, __ATOMIC_SEQ_CST) >> 32));
    if (log_is_published(e) && __atomic_load_n(e->log_owner, __ATOMIC_SEQ_CST) == dead)
        apply_block(e, space, entries, block, &from, &to);
    __atomic_fetch_add(&e->spaces[space].dirty, 1, __ATOMIC_SEQ_CST);
    shoot(e, record, space, REMAP, low, high, 0, NULL);
    refresh(e, space, low, high, 0);
    __atomic_fetch_and(word, 0xffffffffull, __ATOMIC_SEQ_CST);
}

int block_lock(struct engine *e, uint32_t record, uint32_t space, uint64_t block)
{
    uint64_t *locks = locks_of(e, space), mine = holder_for(e, record);
    if (!locks)
        return ENOMEM;
    uint64_t *word = &locks[block];
    for (int spins = 100;;) {
        uint64_t seen = 0;
        if (__atomic_compare_exchange_n(word, &seen, mine, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return 0;
        if (holder(seen) == mine)
            return 0;
        if (spins-- > 0)
            continue;
        if (process_of(holder(seen)) != process_of((uint32_t)mine) && is_dead(e, holder(seen))) {
            uint64_t owed = seen >> 32 ? seen >> 32 : holder(seen);
            if (__atomic_compare_exchange_n(word, &seen, owed << 32 | WAITED | mine, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
                repair(e, record, space, block);
                return 0;
            }
            continue;
        }
        uint64_t waited = seen | WAITED;
        if (seen & WAITED || __atomic_compare_exchange_n(word, &seen, waited, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            futex_wait((uint32_t *)word, (uint32_t)waited, 20);
    }
}

void block_unlock(struct engine *e, uint32_t space, uint64_t block)
{
    uint64_t *word = &locks_of(e, space)[block];
    if (__atomic_exchange_n(word, 0, __ATOMIC_SEQ_CST) & WAITED)
        futex_wake((uint32_t *)word);
}

/*
 * A fault enters its new frames and tells others then; until it has, they show the old ones, which no entry names. It holds the block
 * all that time, and so does who takes it over from the dead, until repair has told them. So: look at the entries; call this, which
 * waits for whoever has one of the blocks now; and free what wasn't named. A fault that comes later takes leave of a frame that was.
 */
void await_faults(struct engine *e, uint32_t space)
{
    uint64_t pages = e->spaces[space].pages, *locks = pages ? locks_of(e, space) : NULL;
    if (!locks)
        return;
    sigset_t before;
    block_signals(&before);
    fault_enter();
    uint32_t record = record_take(e);
    for (uint64_t block = 0; block * BLOCK < pages; block++)
        if (__atomic_load_n(&locks[block], __ATOMIC_SEQ_CST) && !block_lock(e, record, space, block))
            block_unlock(e, space, block);
    record_give(e, record);
    fault_leave();
    restore_signals(&before);
}

/* ------------------------------------------------------------- freezing */

/*
 * Make no page of [low, high) private: the next store to each copies it. `words` gets the entries as they stand when nobody can
 * store to their frames any more: a moment later a store may have given a page another frame. Gives up with ETIMEDOUT, and
 * everything as it was, when a process does not answer: it could go on storing.
 */
int freeze(struct engine *e, uint32_t space, uint64_t low, uint64_t high, uint64_t *words, long patience, uint32_t *stuck)
{
    uint64_t *entries = entries_of(e, space);
    if (!entries)
        return ENOMEM;
    if (low >= high)
        return 0;
    sigset_t before;
    block_signals(&before);
    fault_enter();
    uint32_t record = record_take(e);
    uint64_t first = low / BLOCK, last = (high - 1) / BLOCK, any = 0;
    int failed = 0;
    for (uint64_t block = first; block <= last && !failed; block++)
        failed = block_lock(e, record, space, block);
    for (uint64_t page = low; page < high && !failed; page++)
        if (entries[page] & PRIVATE) {
            any = 1;
            __atomic_store_n(&entries[page], (entries[page] & ~PRIVATE) | FREEZING, __ATOMIC_SEQ_CST);
        }
    if (any) {
        failed = shoot(e, record, space, PROTECT, low, high, patience, stuck);
        protect(e, space, low, high);
    }
    for (uint64_t page = low; page < high && any; page++)
        if (entries[page] & FREEZING)
            __atomic_store_n(&entries[page], (entries[page] & ~FREEZING) | (failed ? PRIVATE : 0), __ATOMIC_SEQ_CST);
    for (uint64_t page = low; page < high && !failed; page++)
        words[page - low] = entries[page];
    for (uint64_t block = first; block <= last; block++)
        if (is_ours(e, record, space, block))
            block_unlock(e, space, block);
    record_give(e, record);
    fault_leave();
    restore_signals(&before);
    return failed;
}

/* ----------------------------------------------------------- publishing */

static uint64_t step_word(const struct run *run, uint64_t page)
{
    uint64_t word = run->word;
    return word & PFN_MASK && !(word & BEYOND) ? word + (page - run->page) : word;
}

static int same_place(uint64_t a, uint64_t b)
{
    return !((a ^ b) & (PFN_MASK | BEYOND));
}

/* The frame has come into the extents: no fault's any more. Only one of those who say so at the same time counts it. */
static void hand_over(struct engine *e, uint64_t pfn)
{
    if ((__atomic_load_n(&e->table[pfn], __ATOMIC_SEQ_CST) & (USED | BACKED)) == (USED | BACKED) &&
        __atomic_fetch_and(&e->table[pfn], (uint8_t)~BACKED, __ATOMIC_SEQ_CST) & BACKED)
        __atomic_fetch_sub(&e->counters->held, 1, __ATOMIC_SEQ_CST);
}

/* Do what the log says about one locked block; doing it again changes nothing. [*low, *high) grows by the pages that moved. */
static void apply_block(struct engine *e, uint32_t space, uint64_t *entries, uint64_t block, uint64_t *low, uint64_t *high)
{
    struct counters *c = e->counters;
    uint64_t start = block * BLOCK, end = start + BLOCK;
    if (end > e->spaces[space].pages)
        end = e->spaces[space].pages;
    /* The log is ascending by space and page: find the first run that reaches into the block. */
    uint64_t from = 0, to = log_runs(e);
    while (from < to) {
        uint64_t middle = (from + to) / 2;
        const struct run *run = &e->log[middle];
        uint64_t last = run->page + (run->space & ZERO ? 1 : run->pages);
        if ((uint32_t)run->space < space || ((uint32_t)run->space == space && last <= start))
            from = middle + 1;
        else
            to = middle;
    }
    for (; from < log_runs(e); from++) {
        const struct run *run = &e->log[from];
        if ((uint32_t)run->space != space || run->page >= end)
            break;
        if (run->space & ZERO) {
            uint64_t first = run->pages >> 16, behind = run->pages & 0xffff;
            if (e->cache)
                cache_clear(e->cache, run->word, first, behind);
            else
                memset(e->pool + run->word * PAGE + first, 0, behind - first);
            continue;
        }
        uint64_t page = run->page > start ? run->page : start, behind = run->page + run->pages;
        for (; page < behind && page < end; page++) {
            uint64_t have = entries[page], want = step_word(run, page);
            if (run->space & FOLD) {
                hand_over(e, want & PFN_MASK);
                if (!same_place(have, want))
                    continue;
            }
            if (same_place(have, want)) {
                if (have & DIRTY) {
                    hand_over(e, have & PFN_MASK);
                    __atomic_fetch_sub(&c->dirty, 1, __ATOMIC_RELAXED);
                    __atomic_store_n(&entries[page], have & ~DIRTY, __ATOMIC_SEQ_CST);
                }
                continue;
            }
            if (have & DIRTY) {
                __atomic_fetch_sub(&c->dirty, 1, __ATOMIC_RELAXED);
                __atomic_fetch_add(&c->strays, 1, __ATOMIC_RELAXED);
            }
            __atomic_store_n(&entries[page], want, __ATOMIC_SEQ_CST);
            if (e->cache)
                cache_moved(e->cache, space, page, 1);
            if (*low >= *high)
                *low = page, *high = page + 1;
            else {
                *low = page < *low ? page : *low;
                *high = page + 1 > *high ? page + 1 : *high;
            }
        }
    }
}

/* Call `visit` for each block of the spaces with entries that runs [from, to) of the log are about, ascending, each once. */
static int64_t each_block_of(struct engine *e, uint32_t record, uint64_t from, uint64_t to,
                             int64_t (*visit)(struct engine *, uint32_t, uint32_t, uint64_t, uint64_t))
{
    uint32_t last_space = SPACES;
    uint64_t last_block = 0;
    for (uint64_t i = from; i < to && !(e->log[i].space & HAND); i++) {
        const struct run *run = &e->log[i];
        uint32_t space = (uint32_t)run->space;
        uint64_t end = run->page + (run->space & ZERO ? 1 : run->pages);
        if (end > e->spaces[space].pages)
            end = e->spaces[space].pages;
        for (uint64_t block = run->page / BLOCK; block * BLOCK < end; block++) {
            if (space == last_space && block <= last_block)
                continue;
            last_space = space;
            last_block = block;
            int64_t result = visit(e, record, space, block, i);
            if (result)
                return result;
        }
    }
    return 0;
}

static int64_t each_block(struct engine *e, uint32_t record, int64_t (*visit)(struct engine *, uint32_t, uint32_t, uint64_t, uint64_t))
{
    return each_block_of(e, record, 0, log_runs(e), visit);
}

static int64_t lock_one(struct engine *e, uint32_t record, uint32_t space, uint64_t block, uint64_t run)
{
    (void)run;
    return block_lock(e, record, space, block);
}

static int64_t unlock_one(struct engine *e, uint32_t record, uint32_t space, uint64_t block, uint64_t run)
{
    (void)run;
    if (is_ours(e, record, space, block))
        block_unlock(e, space, block);
    return 0;
}

/* A run that must keep what was stored: a page that became private since the transaction looked has another PFN than it says. */
static int64_t conflict(struct engine *e)
{
    for (uint64_t i = 0; i < log_runs(e); i++) {
        const struct run *run = &e->log[i];
        uint32_t space = (uint32_t)run->space;
        if (!(run->space & KEEP) || !e->spaces[space].pages)
            continue;
        const uint64_t *entries = entries_of(e, space);
        uint64_t end = run->page + run->pages;
        for (uint64_t page = run->page; page < end && page < e->spaces[space].pages; page++)
            if (entries[page] & PRIVATE && !same_place(entries[page], step_word(run, page)))
                return (int64_t)i;
    }
    return -1;
}

/* Tell all mappers about one space: what moved, or, of a space without entries, that there is a log to read. */
static void tell(struct engine *e, uint32_t record, uint32_t space, uint64_t low, uint64_t high)
{
    if (!e->spaces[space].pages) {
        shoot(e, record, space, LOG, 0, 0, 0, NULL);
        apply_log(e, space);
    } else if (low < high) {
        shoot(e, record, space, REMAP, low, high, 0, NULL);
        refresh(e, space, low, high, 0);
    }
}

static int64_t apply_one(struct engine *e, uint32_t record, uint32_t space, uint64_t block, uint64_t run)
{
    (void)record;
    (void)run;
    uint64_t *moved = e->moved;
    apply_block(e, space, entries_of(e, space), block, &moved[0], &moved[1]);
    return 0;
}

/* Call `tell` for each space that the log is about, after `visit` for each of its blocks; then hand frames over. */
static void each_space(struct engine *e, uint32_t record, int64_t (*visit)(struct engine *, uint32_t, uint32_t, uint64_t, uint64_t))
{
    uint64_t count = log_runs(e);
    for (uint64_t i = 0; i < count;) {
        uint64_t next = i, space = (uint32_t)e->log[i].space;
        if (e->log[i].space & HAND) {
            for (uint64_t n = 0; n < e->log[i].pages; n++)
                hand_over(e, e->log[i].word + n);
            i++;
            continue;
        }
        while (next < count && (uint32_t)e->log[next].space == space)
            next++;
        e->moved[0] = e->moved[1] = 0;
        each_block_of(e, record, i, next, visit);
        STEP(AT_APPLIED);
        tell(e, record, (uint32_t)space, e->moved[0], e->moved[1]);
        i = next;
    }
}

/* Readers without the lock see all of a commit or nothing: who finds a version odd, or changed meanwhile, looks again. */
static void begin_versions(struct engine *e)
{
    for (uint64_t i = 0; i < log_runs(e) && !(e->log[i].space & HAND); i++) {
        uint64_t *version = &e->spaces[(uint32_t)e->log[i].space].version;
        if (!(*version & 1))
            __atomic_store_n(version, *version + 1, __ATOMIC_SEQ_CST);
    }
}

static void end_versions(struct engine *e)
{
    for (uint64_t i = 0; i < log_runs(e) && !(e->log[i].space & HAND); i++) {
        uint64_t *version = &e->spaces[(uint32_t)e->log[i].space].version;
        if (*version & 1)
            __atomic_store_n(version, *version + 1, __ATOMIC_SEQ_CST);
    }
}

int64_t commit(struct engine *e, uint64_t generation)
{
    sigset_t before;
    block_signals(&before);
    fault_enter();
    uint32_t record = record_take(e);
    __atomic_store_n(e->log_generation, generation, __ATOMIC_SEQ_CST);
    __atomic_store_n(e->log_owner, process_of(holder_for(e, record)), __ATOMIC_SEQ_CST);
    int64_t failed = each_block(e, record, lock_one), result = -1;
    STEP(AT_ALL_LOCKED);
    if (failed)
        result = -2 - failed;
    else if ((result = conflict(e)) < 0) {
        begin_versions(e);
        __atomic_store_n(e->live, generation, __ATOMIC_SEQ_CST); /* the transaction is published */
        STEP(AT_LIVE);
        each_space(e, record, apply_one);
        end_versions(e);
    }
    __atomic_store_n(e->log_generation, UINT64_MAX, __ATOMIC_SEQ_CST); /* done: who takes over from us now must not redo it */
    STEP(AT_FORGOTTEN);
    each_block(e, record, unlock_one);
    __atomic_store_n(e->log_count, 0, __ATOMIC_SEQ_CST);
    record_give(e, record);
    fault_leave();
    restore_signals(&before);
    return result;
}

static int64_t pass_one(struct engine *e, uint32_t record, uint32_t space, uint64_t block, uint64_t run)
{
    if (!lock_one(e, record, space, block, run)) /* which repairs it; or who was faster has, when he unlocks it */
        block_unlock(e, space, block);
    return 0;
}

/* Finish what a dead process published; forget what it didn't. The caller holds the transaction lock. */
void redo(struct engine *e)
{
    sigset_t before;
    block_signals(&before);
    fault_enter();
    uint32_t record = record_take(e);
    if (log_is_published(e))
        each_space(e, record, pass_one);
    end_versions(e);
    __atomic_store_n(e->log_generation, UINT64_MAX, __ATOMIC_SEQ_CST);
    __atomic_store_n(e->log_count, 0, __ATOMIC_SEQ_CST);
    record_give(e, record);
    fault_leave();
    restore_signals(&before);
}

/* Take a dead process's blocks over, and its name off all spaces. The caller holds the transaction lock and has called redo. */
void bury(struct engine *e, uint32_t slot)
{
    sigset_t before;
    block_signals(&before);
    fault_enter();
    uint32_t record = record_take(e);
    for (uint32_t space = 0; space < *e->spaces_used; space++) {
        struct space *s = &e->spaces[space];
        __atomic_fetch_and(&s->mappers[slot / 64], ~(1ull << slot % 64), __ATOMIC_SEQ_CST);
        uint64_t *locks = s->pages ? locks_of(e, space) : NULL;
        for (uint64_t block = 0; locks && block * BLOCK < s->pages; block++) {
            uint64_t seen = __atomic_load_n(&locks[block], __ATOMIC_SEQ_CST);
            if (seen && slot_of(holder(seen)) == slot && !block_lock(e, record, space, block))
                block_unlock(e, space, block);
        }
    }
    for (uint32_t i = 0; i < RECORDS; i++) {
        struct record *m = &e->records[slot * RECORDS + i];
        __atomic_store_n(&m->count, 0, __ATOMIC_SEQ_CST);
        for (uint32_t w = 0; w < SLOTS / 32; w++)
            __atomic_store_n(&m->acks[w], 0, __ATOMIC_SEQ_CST); /* what it asked for has been done, or nobody needs it */
    }
    memset(&e->bells[slot].bits, 0, sizeof e->bells[slot].bits);
    record_give(e, record);
    fault_leave();
    restore_signals(&before);
}
