/*
 * For driver.c: orders of events that are rare, forced. A process whose service thread is stopped is one that is slow to answer: to store is to wait for it.
 */
#include <sys/prctl.h>

static void until(const char *what, int (*is_so)(void))
{
    for (int n = 0; !is_so(); n++) {
        CHECK(what, n < 20000 && !__atomic_load_n(&control->stop, __ATOMIC_SEQ_CST), 0, 0, 0);
        usleep(1000);
    }
}

static void say_turn(uint64_t turn)
{
    __atomic_store_n(&control->turn, turn, __ATOMIC_SEQ_CST);
}

static uint64_t wanted;

static int is_turn(void)
{
    return __atomic_load_n(&control->turn, __ATOMIC_SEQ_CST) >= wanted;
}

static void await_turn(uint64_t turn)
{
    wanted = turn;
    until("its turn", is_turn);
}

static uint32_t awaited; /* a slot */

static int is_awaited(void)
{
    for (uint32_t r = 0; r < PROCESSES * RECORDS; r++)
        if (__atomic_load_n(&base->records[r].acks[awaited / 32], __ATOMIC_SEQ_CST) >> awaited % 32 & 1)
            return 1;
    return 0;
}

static int is_taken_over(void)
{
    return __atomic_load_n(locks_of(&engine, 0), __ATOMIC_SEQ_CST) >> 32 != 0 && is_awaited();
}

static pid_t run(void (*process)(void))
{
    pid_t pid = fork();
    MUST(pid);
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    lock_own = reopen(lock_fd);
    start_engine(PROCESSES);
    begin();
    int slot = claim_slot(&slot_fd);
    finish();
    join((uint32_t)slot);
    process();
    leave();
    _exit(0);
}

static int end_of(pid_t pid)
{
    int status;
    MUST(waitpid(pid, &status, 0));
    return status;
}

static void store(uint64_t page, uint64_t value)
{
    put_word(word_of(&regions[0], page, 0), value);
}

static void shows(const char *what, uint64_t page, uint64_t value)
{
    for (int i = 0; i <= THREADS; i++)
        CHECK(what, word_in(word_of(&regions[i], page, 0)) == value, page, word_in(word_of(&regions[i], page, 0)), value);
}

static void freeze_page(uint64_t page, uint64_t *word)
{
    uint32_t stuck;
    begin();
    CHECK("freeze", !freeze(&engine, 0, page, page + 1, word, 20000, &stuck), stuck, 0, 0);
    finish();
}

/* ------------------------------------- a fork while a message is on its way to the parent */

static void parent(void)
{
    uint64_t word;
    awaited = engine.slot;
    store(0, 1);
    freeze_page(0, &word);
    await_turn(1);
    service_stop(&engine);
    say_turn(2);
    until("a message", is_awaited);
    begin();
    int fd, slot = claim_slot(&fd);
    engine.child_fds[0] = fd;
    engine.child_slot = slot;
    pid_t pid = fork();
    MUST(pid);
    if (!pid) {
        await_turn(3); /* the parent has answered, and the store has returned */
        be_child((uint32_t)slot);
        shows("S3: a forked child shows less than has been stored", 0, 2);
        leave();
        _exit(0);
    }
    finish();
    CHECK("service_start", !service_start(&engine), 0, 0, 0);
    CHECK("the child", end_of(pid) == 0, 0, 0, 0);
}

static void other(void)
{
    say_turn(1);
    await_turn(2);
    store(0, 2);
    say_turn(3);
}

/* ----------------------------------------- a sweep while a store waits for who is slow */

static uint64_t old_frame;

static void slow(void)
{
    store(0, 1);
    say_turn(1);
    await_turn(2);
    service_stop(&engine);
    say_turn(3);
    await_turn(5);
    for (int n = 0; n < 300; n++, usleep(1000)) /* nothing names the frame any more, but we show it */
        shows("S5: a frame that is shown has been freed", 0, 1);
    CHECK("service_start", !service_start(&engine), 0, 0, 0);
}

static void storer(void)
{
    await_turn(3);
    store(0, 2);
    say_turn(6);
}

static void heir(void) /* of the storer's block: it dies */
{
    await_turn(4);
    store(0, 2);
    say_turn(6);
}

static pid_t to_die;

static void sweeper(void)
{
    uint64_t word;
    await_turn(1);
    freeze_page(0, &word); /* for a transaction that fails: no extent names the frame */
    old_frame = word & PFN_MASK;
    CHECK("a fault's frame", old_frame && word & DIRTY, word, 0, 0);
    say_turn(2);
    until("the store", is_awaited);
    if (to_die) {
        kill(to_die, SIGKILL);
        say_turn(4);
        until("that the block is taken over", is_taken_over);
    }
    say_turn(5);
    begin();
    sweep();
    finish();
    await_turn(6);
    shows("S3: the end", 0, 2);
    CHECK("the old frame is still taken", !(base->table[old_frame] & (uint8_t)~BACKED), old_frame, base->table[old_frame], 0);
}

/* 0, 1: failed, or 2: no such order of events. */
static int force(const char *what)
{
    pid_t pids[3] = {0};
    set_up();
    if (!strcmp(what, "fork")) {
        pids[0] = run(parent);
        pids[1] = run(other);
    } else if (!strcmp(what, "sweep") || !strcmp(what, "sweep-heir")) {
        pids[0] = run(slow);
        while (!__atomic_load_n(&control->turn, __ATOMIC_SEQ_CST)) /* it has slot 0 */
            usleep(1000);
        pids[1] = run(storer);
        if (strcmp(what, "sweep")) {
            to_die = pids[1];
            pids[1] = run(heir);
        }
        pids[2] = run(sweeper);
    } else
        return 2;
    int failed = 0;
    for (int i = 0; i < 3; i++)
        failed |= pids[i] ? end_of(pids[i]) : 0;
    return failed || control->failed;
}
