/* See _fault.h for the contract. How a process tells others that a page has moved, and how it hears of it. */
#define _GNU_SOURCE
#include "_fault.h"

#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void note_time(struct engine *e, uint64_t nanoseconds)
{
    uint64_t quarter = nanoseconds / 250;
    unsigned place = 0;
    if (quarter >= 4) {
        unsigned doubling = 63 - (unsigned)__builtin_clzll(quarter); /* quarter in [2^d, 2^(d+1)) */
        place = (doubling - 2) * 4 + (unsigned)((quarter >> (doubling - 2)) & 3);
    }
    if (place > 55)
        place = 55;
    __atomic_fetch_add(&e->counters->times[place], 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&e->counters->shootdowns, 1, __ATOMIC_RELAXED);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void complain(uint32_t slot)
{
    static const char start[] = "onecopy: a store waits for a process that does not answer, slot ";
    char line[128];
    size_t size = sizeof start - 1;
    memcpy(line, start, size);
    if (slot >= 100)
        line[size++] = (char)('0' + slot / 100);
    if (slot >= 10)
        line[size++] = (char)('0' + slot / 10 % 10);
    line[size++] = (char)('0' + slot % 10);
    static const char end[] = " of the pool; is it stopped? 'onecopy info' names it\n";
    memcpy(line + size, end, sizeof end - 1);
    if (write(2, line, size + sizeof end - 1) < 0) {
        /* nowhere to complain to */
    }
}

static void ring(struct engine *e, uint32_t record, uint32_t slot)
{
    struct bell *bell = &e->bells[slot];
    __atomic_fetch_or(&bell->bits[record / 64], 1ull << record % 64, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&bell->futex, 1, __ATOMIC_SEQ_CST);
    futex_wake(&bell->futex);
}

/* A slot's next holder has another incarnation before it maps anything: the one that is seen dead here is never waited for again. */
static int is_gone(struct engine *e, uint32_t slot)
{
    uint64_t holder = __atomic_load_n(&e->incarnations[slot * 8], __ATOMIC_SEQ_CST);
    if (slot_alive(e, slot))
        return 0;
    __atomic_store_n(&e->gone[slot], 1 + holder, __ATOMIC_SEQ_CST);
    return 1;
}

/*
 * Return how many have not answered, one of them in *left. A look skips the dead, and who maps the space no more: a dead one's
 * slot may be somebody else's by now. It rings again for the others: a slot's new holder has never heard the bell.
 */
static int waiting(struct engine *e, uint32_t record, int look, uint32_t *left)
{
    struct record *m = &e->records[record];
    const uint64_t *mappers = e->spaces[m->space].mappers;
    int count = 0;
    for (uint32_t w = 0; w < SLOTS / 32; w++)
        for (uint32_t bits = (uint32_t)__atomic_load_n(&m->acks[w], __ATOMIC_ACQUIRE); bits; bits &= bits - 1) {
            uint32_t slot = w * 32 + (uint32_t)__builtin_ctz(bits);
            if (look && (is_gone(e, slot) || !(__atomic_load_n(&mappers[slot / 64], __ATOMIC_SEQ_CST) >> slot % 64 & 1))) {
                __atomic_fetch_and(&m->acks[w], ~(1ull << slot % 32), __ATOMIC_SEQ_CST);
                continue;
            }
            if (look)
                ring(e, record, slot);
            *left = slot;
            count++;
        }
    return count;
}

int shoot(struct engine *e, uint32_t record, uint32_t space, int kind, uint64_t low, uint64_t high, long patience, uint32_t *stuck)
{
    struct record *m = &e->records[record];
    uint64_t any = 0;
    m->kind = (uint32_t)kind;
    m->space = space;
    m->low = low;
    m->high = high;
    m->number++;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the entries before the mappers */
    for (uint32_t w = 0; w < SLOTS / 32; w++) {
        uint64_t mappers = __atomic_load_n(&e->spaces[space].mappers[w / 2], __ATOMIC_SEQ_CST);
        uint32_t targets = (uint32_t)(w % 2 ? mappers >> 32 : mappers);
        if (w == e->slot / 32)
            targets &= ~(1u << e->slot % 32);
        for (uint32_t bits = targets; bits; bits &= bits - 1) { /* the dead whom nobody has reaped yet */
            uint32_t slot = w * 32 + (uint32_t)__builtin_ctz(bits);
            if (__atomic_load_n(&e->gone[slot], __ATOMIC_SEQ_CST) == 1 + __atomic_load_n(&e->incarnations[slot * 8], __ATOMIC_SEQ_CST))
                targets &= ~(1u << slot % 32);
        }
        __atomic_store_n(&m->acks[w], (uint64_t)m->number << 32 | targets, __ATOMIC_SEQ_CST); /* the message stands before this */
        any |= targets;
    }
    if (!any)
        return 0;
    uint64_t start = now();
    for (uint32_t w = 0; w < SLOTS / 32; w++)
        for (uint32_t bits = (uint32_t)__atomic_load_n(&m->acks[w], __ATOMIC_RELAXED); bits; bits &= bits - 1)
            ring(e, record, w * 32 + (uint32_t)__builtin_ctz(bits));
    uint32_t slot = 0;
    int said = 0, spins = 200, waits = 0;
    for (;;) {
        uint32_t seen = __atomic_load_n(&m->futex, __ATOMIC_SEQ_CST);
        if (!waiting(e, record, 0, &slot))
            break;
        if (spins-- > 0) {
            for (int i = 0; i < 20; i++)
                __asm__ volatile("" ::: "memory");
            continue;
        }
        if (futex_wait(&m->futex, seen, waits++ ? 20 : 1) != ETIMEDOUT)
            continue;
        if (!waiting(e, record, 1, &slot))
            break;
        uint64_t waited = (now() - start) / 1000000;
        if (patience && waited > (uint64_t)patience) {
            for (uint32_t w = 0; w < SLOTS / 32; w++)
                __atomic_store_n(&m->acks[w], 0, __ATOMIC_SEQ_CST);
            *stuck = slot;
            return ETIMEDOUT;
        }
        if (waited > 10000 && !said++)
            complain(slot);
    }
    note_time(e, now() - start);
    return 0;
}

static void answer(struct engine *e, uint32_t record)
{
    struct record *m = &e->records[record];
    uint64_t mine = 1ull << e->slot % 32, *acks = &m->acks[e->slot / 32], seen = __atomic_load_n(acks, __ATOMIC_SEQ_CST);
    /* A bell may be older than the message: only who is waited for may read it, and it stands complete then. */
    if (!(seen & mine))
        return;
    uint32_t space = (uint32_t)m->space;
    if (space < SPACES && __atomic_load_n(&e->chain[space], __ATOMIC_RELAXED)) {
        if (m->kind == PROTECT)
            protect(e, space, m->low, m->high);
        else if (m->kind == LOG)
            apply_log(e, space);
        else
            refresh(e, space, m->low, m->high, 0);
    }
    /* The answer is to the message that was read: its sender may have given us up, and sent another one meanwhile. */
    uint64_t have = seen;
    while (have >> 32 == seen >> 32 && have & mine)
        if (__atomic_compare_exchange_n(acks, &have, have & ~mine, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            break;
    for (uint32_t w = 0; w < SLOTS / 32; w++)
        if ((uint32_t)__atomic_load_n(&m->acks[w], __ATOMIC_SEQ_CST))
            return; /* the last one to answer wakes who waits */
    __atomic_fetch_add(&m->futex, 1, __ATOMIC_SEQ_CST);
    futex_wake(&m->futex);
}

static void *serve(void *argument)
{
    struct engine *e = argument;
    struct bell *bell = &e->bells[e->slot];
    for (;;) {
        uint32_t seen = __atomic_load_n(&bell->futex, __ATOMIC_SEQ_CST); /* before all looks: what comes after one wakes us */
        if (__atomic_load_n(&e->stopping, __ATOMIC_SEQ_CST))
            break;
        int any = 0;
        for (uint32_t w = 0; w < SLOTS * RECORDS / 64; w++)
            if (__atomic_load_n(&bell->bits[w], __ATOMIC_SEQ_CST))
                for (uint64_t bits = __atomic_exchange_n(&bell->bits[w], 0, __ATOMIC_SEQ_CST); bits; bits &= bits - 1) {
                    answer(e, w * 64 + (uint32_t)__builtin_ctzll(bits));
                    any = 1;
                }
        if (!any)
            futex_wait(&bell->futex, seen, 0);
    }
    return NULL;
}

int service_start(struct engine *e)
{
    sigset_t before;
    e->stopping = 0;
    block_signals(&before); /* the thread inherits the mask: it gets no signal */
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    int failed = pthread_create(&e->service, &attributes, serve, e);
    pthread_attr_destroy(&attributes);
    restore_signals(&before);
    e->alive = !failed;
    return failed;
}

void service_stop(struct engine *e)
{
    if (!e->alive)
        return;
    struct bell *bell = &e->bells[e->slot];
    __atomic_store_n(&e->stopping, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&bell->futex, 1, __ATOMIC_SEQ_CST);
    futex_wake(&bell->futex);
    pthread_join(e->service, NULL);
    e->alive = 0;
}
