/* See _fault.h for the contract. The signal handlers, and who was there before. */
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
    } else if (!r) {
        struct cache *c = cache_around(address);
        failed = c ? cache_show_page(c, address) : -1;
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
