/*
 * The native half without Python, for sanitizers: processes that store into one file through mappings, clone it, move its pages, fork,
 * and die at steps, for a while; then everything is checked. Usage: driver SECONDS SEED [k] [f] [r], or driver force WHAT
 * k: they die; f: they fork; r: slots of the dead are used again (else the run ends when there are no more)
 *
 * Every thread has a word of its own in each page and counts up in it. `begun` and `done` say, for all to see, which count it is
 * about to store and which store has returned: any mapping must show at least `done`, and at most `begun`.
 */
#include "stand_in.h"

#include "forced.h"

/* ----------------------------------------------------------- workers */

static void *work(void *argument)
{
    uint64_t thread = (uint64_t)(uintptr_t)argument, lane = engine.slot * THREADS + thread;
    struct region *r = &regions[thread];
    if (thread)
        state = lane * 77 + 1 + (uint64_t)getpid();
    for (int n = 0; (thread == 0 ? n < 40 : 1) && !__atomic_load_n(&control->stop, __ATOMIC_ACQUIRE); n++) {
        uint64_t page = number(3) ? number(64) : number(PAGES), other = number(LANES), high = page + 1 + number(32);
        if (number(16) == 0)
            CHECK("make_private", !make_private(&engine, 0, page, high < PAGES ? high : PAGES, (int)number(2)), (uint64_t)errno, page, 0);
        uint64_t value = __atomic_add_fetch(&control->begun[lane][page], 1, __ATOMIC_SEQ_CST);
        put_word(word_of(r, page, lane), value);
        __atomic_store_n(&control->done[lane][page], value, __ATOMIC_SEQ_CST);
        page = number(64);
        uint64_t least = __atomic_load_n(&control->done[other][page], __ATOMIC_SEQ_CST);
        /* Thread 0 alone reads through the last one, which it takes away at times. */
        uint64_t seen = word_in(word_of(&regions[number(thread ? THREADS : THREADS + 1)], page, other));
        uint64_t most = __atomic_load_n(&control->begun[other][page], __ATOMIC_SEQ_CST);
        CHECK("S3: a mapping shows less than has been stored", seen >= least, other, seen, least);
        CHECK("S5: a mapping shows what nobody has stored there", seen <= most, other, seen, most);
    }
    return NULL;
}

/* Fork as Mount.prepare_child and become_child do: the child's slot is there before the child is; fork makes it a mapper. */
static void fork_one(void)
{
    int fd;
    begin();
    int slot = claim_slot(&fd);
    if (slot < 0) {
        finish();
        return;
    }
    engine.child_fds[0] = fd;
    engine.child_slot = slot;
    pid_t pid = fork();
    MUST(pid);
    if (pid) {
        finish();
        __atomic_add_fetch(&control->forks, 1, __ATOMIC_SEQ_CST);
        return;
    }
    be_child((uint32_t)slot);
    work((void *)0);
    if (number(4))
        leave();
    _exit(0); /* else: dead, for others to find */
}

static void worker(uint64_t seed)
{
    state = seed;
    signal(SIGCHLD, SIG_IGN);
    lock_own = reopen(lock_fd);
    start_engine(PROCESSES); /* as the janitor of daxemu.slots, while there is no other slot */
    int slot = -1, fd = reopen(runtime_fd);
    for (; slot < 0 && !__atomic_load_n(&control->stop, __ATOMIC_ACQUIRE); usleep(500)) {
        CHECK("flock", !flock(lock_own, LOCK_EX), (uint64_t)errno, 0, 0);
        if ((slot = claim_slot(&slot_fd)) < 0 && reuse) {
            CHECK("janitor", lock_range(fd, F_OFD_SETLK, PROCESSES) >= 0, 0, 0, 0);
            begin();
            slot = claim_slot(&slot_fd);
            if (slot < 0) { /* another one is the janitor then */
                close(fd);
                fd = reopen(runtime_fd);
            }
        }
        finish();
    }
    close(fd);
    if (slot < 0)
        _exit(0);
    join((uint32_t)slot);
    if (kills && number(4)) {
        die_at = (int)number(AT_FORGOTTEN + 1);
        die_after = 1 + (int)number(die_at < AT_ALL_LOCKED ? 60 : 6);
        fault_step = die;
    }
    pthread_t threads[THREADS];
    for (uint64_t i = 1; i < THREADS; i++)
        CHECK("thread", !pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)i), 0, 0, 0);
    while (!__atomic_load_n(&control->stop, __ATOMIC_ACQUIRE)) {
        work((void *)0);
        uint64_t what = number(8);
        if (what < 4)
            change();
        else if (what == 4 && forks)
            fork_one();
        else if (what == 5) { /* one mapping ends and begins anew */
            begin();
            region_remove(&regions[THREADS]);
            region_add(&regions[THREADS]);
            CHECK("map_region", !map_region(&regions[THREADS], 0, PAGES), 0, 0, 0);
            finish();
        }
    }
    for (uint64_t i = 1; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    leave();
    engines_remove(&engine);
    _exit(0);
}

static void check_end(void)
{
    start_engine(PROCESSES);
    slot_fd = reopen(runtime_fd);
    lock_range(slot_fd, F_OFD_SETLK, PROCESSES);
    lock_own = reopen(lock_fd);
    for (uint32_t left = PROCESSES; left;) { /* forked children end, too */
        begin();
        left = 0;
        for (uint32_t s = 0; s < PROCESSES; s++)
            left += control->taken[s] == 1;
        left ? finish() : sweep();
        usleep(left ? 5000 : 0);
    }
    check_clones();
    static uint8_t named[FRAMES];
    for (uint64_t p = 0; p < PAGES; p++) {
        uint64_t word = entry(p), pfn = word & PFN_MASK;
        CHECK("an entry's frame isn't in use", base->table[pfn] & USED, p, pfn, base->table[pfn]);
        CHECK("a frame has two names", !pfn || !named[pfn]++, p, pfn, 0);
        CHECK("a lock is left", locks_of(&engine, 0)[p / BLOCK] == 0, p, locks_of(&engine, 0)[p / BLOCK], 0);
        for (int c = 0; c < CLONES && word & PRIVATE; c++)
            for (uint64_t q = 0; q < PAGES; q++)
                CHECK("S2: a private page is a clone's", control->clone[c].pfn[q] != pfn, p, pfn, q);
        for (uint64_t lane = 0; lane < LANES; lane++) {
            uint64_t seen = ((uint64_t *)(pool + pfn * PAGE))[lane * 7];
            CHECK("a store is lost", seen >= control->done[lane][p], lane, p, control->done[lane][p] - seen);
            CHECK("a store that never was", seen <= control->begun[lane][p], lane, p, seen);
        }
    }
    finish();
    service_stop(&engine);
}

int main(int argc, char **argv)
{
    if (argc > 2 && !strcmp(argv[1], "force"))
        return force(argv[2]);
    int seconds = argc > 1 ? atoi(argv[1]) : 2, failed = 0, status;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    for (int i = 3; i < argc; i++)
        kills |= *argv[i] == 'k', forks |= *argv[i] == 'f', reuse |= *argv[i] == 'r';
    set_up();
    time_t end = time(NULL) + seconds;
    for (int i = 0, left = 0; i < WORKERS || left;) {
        for (; time(NULL) < end && left < WORKERS; i++, left++) {
            pid_t pid = fork();
            if (!pid)
                worker(seed * 1000 + (uint64_t)i + 1);
            if (pid < 0)
                return perror("fork"), 2;
        }
        if (time(NULL) >= end)
            __atomic_store_n(&control->stop, 1, __ATOMIC_RELEASE);
        pid_t pid = waitpid(-1, &status, WNOHANG);
        if (pid > 0) {
            left--;
            control->restarts++;
            failed |= !(WIFEXITED(status) && WEXITSTATUS(status) == 0) && !(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        } else
            usleep(1000);
    }
    if (failed || control->failed)
        return fprintf(stderr, "a process failed\n"), 1;
    check_end();
    printf("%llu processes, %llu forks, %llu clones, %llu moves, %llu conflicts, %llu redone; faults %llu, shootdowns %llu\n",
           (unsigned long long)control->restarts, (unsigned long long)control->forks, (unsigned long long)control->clones_made,
           (unsigned long long)control->moves, (unsigned long long)control->conflicts, (unsigned long long)control->redone,
           (unsigned long long)base->counters.faults, (unsigned long long)base->counters.shootdowns);
    return 0;
}
