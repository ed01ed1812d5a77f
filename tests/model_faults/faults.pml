/*
 * A model, for spin, of the entries of one mapped file, the shootdown, freezing, publishing, and of what is done about the dead.
 * Names in comments are those of the code: daxemu/_map.c, _shoot.c, _fault.c, _commit.c; fs/mapped.py; blkcache/spaces.py.
 *
 *   spin -a faults.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan -E -m2000000
 *
 * test_faults_model.py says which configurations are checked, and which mutants (-DM_...) must fail.
 *
 * Slots are processes: a main thread (Process) and, if they map the file, a service thread (Service). All shared words are accessed with
 * sequential consistency in the code, so a step here is one access of shared memory, or several that no other process can tell
 * apart. A process dies between any two steps: its translations go, and the kernel drops its locks (slot, transaction).
 *
 * A frame's content is the set of stores that it shows: one bit a slot. Page p starts in frame p.
 *
 * Checked: S1 and S2 at every translation made and every frame frozen; S3 whenever a store returns and at every translation made
 * after it; S4 at every store; S5 when a frame is freed; at the end that nobody hangs, no store is lost, every entry that isn't dirty
 * is what the extents say, each frame is named once, no lock is left.
 */
#ifndef PAGES
#define PAGES 1
#endif
#ifndef PPB
#define PPB 1          /* pages per block */
#endif
#define BLOCKS (PAGES / PPB)
#define NS 4           /* slots: 0 and 1 store, 2 clones and buries, 3 does either */
#ifndef PRESENT
#define PRESENT 15     /* which of them there are */
#endif
#ifndef DIE
#define DIE 8          /* slots that may die */
#endif
#ifndef KILLS
#define KILLS 1        /* how many do */
#endif
#ifndef CLONERS
#define CLONERS 12     /* slots that may clone or move */
#endif
#ifndef WRITERS
#define WRITERS 11     /* slots that may store */
#endif
#ifndef LATE
#define LATE 2         /* slots that map the file while others are at work; the rest of 0, 1 and 3 have it mapped from the start */
#endif
#ifndef AFTER
#define AFTER 0        /* slots that store after all that */
#endif
#ifndef REUSE
#define REUSE 0        /* slots that are claimed anew once their dead are buried */
#endif
#ifndef SWEEPERS
#define SWEEPERS 0     /* slots whose transaction fails when it has frozen; then they take back what nothing names */
#endif
#ifndef PATIENCE
#define PATIENCE 0     /* freezes that may time out */
#endif
#define STALE (REUSE || PATIENCE)  /* a bell may be older than the message of its record; else some steps can't be told apart */
#if STALE && !defined(M_NO_NUMBER)
#define NUMBERED 1
#else
#define NUMBERED 0
#endif
#define FRAMES 14
#define NONE 255
#define BIT(n) (1 << (n))
#define HAS(set, n) (((set) >> (n)) & 1)

mtype = { REMAP, PROTECT };
mtype = { NOLOG, WRITTEN, PUBLISHED, DONE };  /* log_count and log_generation against live */
mtype = { FOLD, KEEP };

byte entry_pfn[PAGES];                        /* the DAX entries */
bool private[PAGES], dirty[PAGES], freezing[PAGES];
byte extent[PAGES];                           /* what the published trees say */
byte word[BLOCKS], owed[BLOCKS];              /* lock words: NAME of the holder; of the dead whose repair isn't done */
byte content[FRAMES];
byte next_frame = PAGES;
short frozen, cloned, freed;                  /* sets of frames */
byte limbo = NONE;                            /* freed by a published transaction, for the next one to hand out */

byte mappers;                                 /* set of slots */
mtype kind[NS] = REMAP;                       /* each slot's record */
byte low[NS], high[NS], acks[NS], number[NS];
byte bell[NS];                                /* sets of records */
byte shown[NS * PAGES] = NONE;                /* translations */
bool writable[NS * PAGES];
bool mapped[NS], guard[NS];

byte transaction;                             /* lock: holder + 1 */
mtype log = NOLOG;
byte log_owner, log_pfn[PAGES];
mtype log_kind[PAGES] = FOLD;
bool logged[PAGES];
bool cloning;

byte gone, buried, ended, stored;             /* sets of slots; `stored`: stores that have returned */
byte threads[NS], kills, reused, timeouts;
bool closing;
int dying;                                    /* set of spin's process numbers: these go before anybody does a step */
#define LIVES (dying == 0 || HAS(dying, _pid))

#define AT(slot, page) ((slot) * PAGES + (page))
/* A holder is a slot and its incarnation: after REUSE the slot is another process's (holder_for, slot_of, is_dead). */
#define SLOT_OF(name) (((name) - 1) % NS)
#ifdef M_NO_INCARNATION
#define NAME(slot) ((slot) + 1)
#define DEAD(name) HAS(gone, SLOT_OF(name))
#else
#define NAME(slot) ((slot) + 1 + NS * HAS(reused, slot))
#define DEAD(name) ((name) != NAME(SLOT_OF(name)) || HAS(gone, SLOT_OF(name)))
#endif

/* ------------------------------------------------------------------ translations */

#ifdef M_PEERS_WRITABLE
#define PEERS 1
#else
#define PEERS 0        /* only who holds the block's lock, and has all answers, maps a private page writable */
#endif

inline map_page(me, page, pfn, store)         /* map_pages: one mmap */
{
    shown[AT(me, page)] = pfn;
    writable[AT(me, page)] = store;
    assert(!(store && HAS(frozen, pfn)));                     /* S1, S2 */
    assert(!HAS(freed, pfn));                                 /* S5 */
    assert((content[pfn] & stored) == stored || page != 0);   /* S3 */
}

inline refresh(me, from, to, store)           /* refresh, map_region: look entries up and map them, under the guard */
{
    if
    :: atomic {
        mapped[me] && from < to ->            /* e->chain[space] */
        p = from;
#ifndef M_NO_GUARD
        !guard[me];
#endif
        guard[me] = 1; rpfn = entry_pfn[p]; rprivate = private[p]
        };
        do
        :: atomic {
            true ->
            map_page(me, p, rpfn, rprivate && store);
            p++;
            if
            :: p < to -> rpfn = entry_pfn[p]; rprivate = private[p]
            :: else -> guard[me] = 0; p = 0; rpfn = 0; rprivate = 0; break
            fi
            }
        od
    :: else
    fi
}

inline protect(me, from, to)                  /* protect: mprotect, under the guard */
{
    atomic {
        !guard[me] ->
        p = from;
        do
        :: p < to -> writable[AT(me, p)] = 0; p++
        :: else -> p = 0; break
        od
    }
}

/* ---------------------------------------------------------------------- messages */

inline shoot(me, what, from, to, limited)     /* shoot to `targets`; `stuck` returns whether patience ran out */
{
#if STALE
    atomic { kind[me] = what; low[me] = from; high[me] = to };
    atomic { acks[me] = targets; number[me] = (number[me] + NUMBERED) % 8 };
#endif
    do
#if STALE
    :: atomic { HAS(targets, 0) -> bell[0] = bell[0] | BIT(me); targets = targets & ~BIT(0) }
    :: atomic { HAS(targets, 1) && !HAS(targets, 0) -> bell[1] = bell[1] | BIT(me); targets = targets & ~BIT(1) }
    :: atomic { targets == BIT(3) -> bell[3] = bell[3] | BIT(me); targets = 0 }
#else
    :: atomic {
        targets != 0 ->
        kind[me] = what; low[me] = from; high[me] = to; acks[me] = targets & ~gone;
        bell[0] = bell[0] | (HAS(acks[me], 0) << me);
        bell[1] = bell[1] | (HAS(acks[me], 1) << me);
        bell[3] = bell[3] | (HAS(acks[me], 3) << me);
        targets = 0
        }
#endif
                                              /* waiting */
    :: atomic { targets == 0 && acks[me] == 0 ->
#if !STALE
        kind[me] = REMAP; low[me] = 0; high[me] = 0;
#endif
        break }
    :: atomic { targets == 0 && (acks[me] & gone) != 0 -> acks[me] = acks[me] & ~gone }
#ifndef M_WAIT_FOR_STRUCK
    :: atomic { targets == 0 && (acks[me] & ~mappers) != 0 -> acks[me] = acks[me] & mappers }  /* they let go of the file */
#endif
#if STALE && !defined(M_RING_ONCE)
    :: atomic { targets == 0 && HAS(acks[me], 0) && !HAS(bell[0], me) -> bell[0] = bell[0] | BIT(me) }
    :: atomic { targets == 0 && HAS(acks[me], 1) && !HAS(bell[1], me) -> bell[1] = bell[1] | BIT(me) }
    :: atomic { targets == 0 && HAS(acks[me], 3) && !HAS(bell[3], me) -> bell[3] = bell[3] | BIT(me) }
#endif
    :: atomic { limited && targets == 0 && timeouts < PATIENCE && acks[me] != 0 ->
        timeouts++; acks[me] = 0; stuck = 1; break }
    od
}

inline tell(me, what, from, to, limited)      /* shoot, from its fence on: the entries stand; who maps the file? */
{
#if STALE
    targets = mappers & ~BIT(me);
    shoot(me, what, from, to, limited)
#else
    atomic { true -> targets = mappers & ~BIT(me); shoot(me, what, from, to, limited) }  /* until it has to wait */
#endif
}

proctype Service(byte me) provided (LIVES)    /* serve */
{
    byte p, rpfn, record, from, to, seen;
    bool rprivate;
    mtype what = REMAP;
    {
end:    do
        :: atomic {
            bell[me] != 0 ->
            if
            :: HAS(bell[me], 0) -> record = 0
            :: HAS(bell[me], 1) -> record = 1
            :: HAS(bell[me], 2) -> record = 2
            :: HAS(bell[me], 3) -> record = 3
            fi;
            bell[me] = bell[me] & ~BIT(record)
#if STALE
            };
            atomic {
#else
            ;
#endif
            if                                /* answer */
            :: !HAS(acks[record], me) -> record = 0; goto end
            :: HAS(acks[record], me) -> seen = number[record]
            fi
#if STALE
            };
            atomic {
#else
            ;
#endif
            what = kind[record]; from = low[record]; to = high[record]
            };
#ifdef M_ACK_FIRST
            acks[record] = acks[record] & ~BIT(me);
#endif
            if
            :: mapped[me] && what == PROTECT -> protect(me, from, to)
            :: mapped[me] && what == REMAP -> refresh(me, from, to, PEERS)
            :: !mapped[me]
            fi;
            atomic {                          /* the acknowledgement is for the message that was read, or none */
                acks[record] = (number[record] == seen -> acks[record] & ~BIT(me) : acks[record]);
                record = 0; from = 0; to = 0; seen = 0; what = REMAP
            }
        od
    } unless { HAS(gone, me) };
    atomic { p = 0; rpfn = 0; record = 0; from = 0; to = 0; seen = 0; rprivate = 0; what = REMAP; threads[me]-- }
}

/* ------------------------------------------------------------------------ blocks */

inline apply_block(b)                         /* apply_block: idempotent */
{
    a = b * PPB;
    do
    :: atomic {
        true ->
        if
        :: logged[a] && entry_pfn[a] == log_pfn[a] -> dirty[a] = 0
        :: logged[a] && entry_pfn[a] != log_pfn[a] && log_kind[a] == KEEP ->
            entry_pfn[a] = log_pfn[a]; private[a] = 0; dirty[a] = 0; moved = 1
        :: else
        fi;
        a++;
        if
        :: a == b * PPB + PPB -> a = 0; break
        :: else
        fi
        }
    od
}

inline repair(me, b)                          /* repair: the block is ours; its holder died with it */
{
    atomic {                                  /* a freeze that didn't come to its end: the file's alone again */
        a = b * PPB;
        do
        :: a < b * PPB + PPB -> private[a] = private[a] || freezing[a]; freezing[a] = 0; a++
        :: else -> a = 0; break
        od
    };
    if
    :: log == PUBLISHED && log_owner == owed[b] -> apply_block(b)
    :: else
    fi;
#ifndef M_TAKE_OVER_SILENTLY
    tell(me, REMAP, b * PPB, b * PPB + PPB, 0);
#endif
    refresh(me, b * PPB, b * PPB + PPB, PEERS);
    owed[b] = 0
}

#if REUSE                                      /* block_lock: is the holder dead? The answer may be old when the block is taken over */
#define SEE_DEAD(b) saw = (word[b] != 0 && DEAD(word[b]) -> word[b] : 0) }; atomic { true ->
#else
#define SEE_DEAD(b)
#endif

inline take_block(me, b)                      /* block_lock's compare-and-swap */
{
    if
    :: word[b] == 0 || word[b] == NAME(me) -> word[b] = NAME(me)
    :: word[b] != 0 && word[b] != NAME(me) && (word[b] == saw || DEAD(word[b])) ->
#ifdef M_OWED_FORGOTTEN
        owed[b] = word[b];
#else
        owed[b] = (owed[b] -> owed[b] : word[b]);
#endif
        word[b] = NAME(me); dead = 1
    fi;
    saw = 0
}

inline block_lock(me, b)                      /* block_lock */
{
    atomic { true -> SEE_DEAD(b) take_block(me, b) };
    if
    :: dead -> dead = 0; repair(me, b)
    :: else
    fi
}

#define block_unlock(b) word[b] = 0

/* ------------------------------------------------------------------------ stores */

#ifdef M_MAPPERS_FIRST
#define SEE_MAPPERS targets = mappers & ~BIT(me)
#define TELL shoot
#else
#define SEE_MAPPERS
#define TELL tell
#endif

inline store(me)                              /* the CPU's store to page 0, and the handler: fault, fault_page, break_sharing */
{
    do
    :: atomic {
        writable[AT(me, 0)] ->                /* the store instruction */
        f = shown[AT(me, 0)];
        assert(!HAS(frozen, f) && !HAS(cloned, f) && !HAS(freed, f));         /* S4, S5 */
        content[f] = content[f] | BIT(me);
        stored = stored | BIT(me);
        q = 0;
        do                                    /* S3 */
        :: q < NS ->
            assert(shown[AT(q, 0)] == NONE || HAS(content[shown[AT(q, 0)]], me));
            q++
        :: else -> break
        od;
        q = 0; f = 0;
        break
        }
    :: atomic { !writable[AT(me, 0)] -> SEE_DEAD(0) take_block(me, 0) };
        do                                    /* break_sharing: the whole block is the granule */
        :: atomic { dead -> dead = 0 };
            repair(me, 0)
        :: atomic {
            !dead && i < PPB && !private[i] ->
            SEE_MAPPERS;
            f = next_frame; next_frame++;                                           /* take_frames */
            content[f] = content[entry_pfn[i]]                                      /* copy_pages */
            };
            atomic { entry_pfn[i] = f; private[i] = 1; dirty[i] = 1; f = 0; i++; copied = 1 }
        :: atomic { !dead && i < PPB && private[i] -> i++ }
        :: atomic { !dead && i == PPB && !copied -> i = 0; break }
        :: atomic { !dead && i == PPB && copied -> i = 0; copied = 0; TELL(me, REMAP, 0, PPB, 0); break }
        od;
        refresh(me, 0, PPB, 1);
        block_unlock(0)
    od
}

/* ------------------------------------------------------------------ transactions */

inline reset_log()
{
    a = 0;
    do
    :: a < PAGES -> log_pfn[a] = 0; logged[a] = 0; log_kind[a] = FOLD; a++
    :: else -> break
    od;
    a = 0; cloning = 0
}

inline redo(me)                               /* redo: the transaction lock is held */
{
    if
    :: log == PUBLISHED ->
        b = 0;
        do
#ifdef M_REDO_SKIPS
        :: atomic { b < BLOCKS && word[b] != log_owner -> b++ }
        :: atomic { b < BLOCKS && word[b] == log_owner -> owed[b] = word[b]; word[b] = NAME(me) };
            repair(me, b);
            block_unlock(b);
            b++
#else
        :: b < BLOCKS -> block_lock(me, b); block_unlock(b); b++
#endif
        :: atomic { b == BLOCKS -> b = 0; break }
        od
    :: else
    fi;
    atomic { log = NOLOG; log_owner = 0; moved = 0; reset_log() }
}

inline begin(me)                              /* Mount._begin */
{
    atomic { transaction == 0 -> transaction = me + 1 };
    if
#ifdef M_NO_REDO
    :: log == WRITTEN -> redo(me)
#else
    :: log != NOLOG -> redo(me)
#endif
    :: else
    fi;
    atomic {                                  /* Limbo.reclaim: what earlier transactions freed may be handed out */
        if
        :: limbo != NONE ->
            q = 0;
            do
            :: q < NS * PAGES -> assert(shown[q] != limbo); q++                 /* S5 */
            :: else -> break
            od;
            q = 0; freed = freed | BIT(limbo); limbo = NONE
        :: else
        fi
    }
}

#define finish() transaction = 0

inline unlock_all(me)
{
    do
    :: atomic {
        true ->
        if :: word[b] == NAME(me) -> block_unlock(b) :: else fi;
        b++;
        if :: b == BLOCKS -> b = 0; break :: else fi
        }
    od
}

inline lock_all(me)
{
    do
    :: atomic {
        b < BLOCKS ->
        SEE_DEAD(b)
        take_block(me, b);
        b++;
        if :: !dead && b == BLOCKS -> b = 0; break :: else fi
        };
        if
        :: atomic { dead -> dead = 0 }; repair(me, (b - 1))
        :: !dead
        fi
    :: atomic { b == BLOCKS -> b = 0; break }
    od
}

inline take_words()                           /* what is frozen: from now on nobody stores there */
{
    atomic {
        do
        :: i < PAGES ->
            frozen = frozen | BIT(entry_pfn[i]);
            logged[i] = dirty[i]; log_pfn[i] = entry_pfn[i];
            assert(dirty[i] || extent[i] == entry_pfn[i]);
            assert(i != 0 || (content[entry_pfn[0]] & stored) == stored);
            q = 0;
            do
            :: q < NS -> assert(!(writable[AT(q, i)] && shown[AT(q, i)] == entry_pfn[i])); q++      /* S2 */
            :: else -> break
            od;
            q = 0; i++
        :: else -> break
        od;
        i = 0
    }
}

inline freeze(me)                             /* freeze, and the words that it hands out for Changes.freeze to fold */
{
    lock_all(me);
    do
    :: atomic {
        true ->
        frozen_here = frozen_here || private[i];
        freezing[i] = private[i];
#ifndef M_FREEZE_KEEPS_PRIVATE
        private[i] = 0;
#endif
        i++;
        if :: i == PAGES -> i = 0; break :: else fi
        }
    od;
#ifndef M_FREEZE_SILENTLY
    if
    :: frozen_here ->
        tell(me, PROTECT, 0, PAGES, 1);
        if :: mapped[me] -> protect(me, 0, PAGES) :: else fi
    :: else
    fi;
#endif
    do
    :: atomic {
        true ->
#ifndef M_TIMEOUT_STAYS_FROZEN
        private[i] = private[i] || (stuck && freezing[i]);
#endif
        freezing[i] = 0;
        i++;
        if :: i == PAGES -> i = 0; break :: else fi
        }
    od;
#ifndef M_FOLD_LATER
    if
    :: stuck
    :: else -> take_words()                   /* `words` */
    fi;
#endif
    frozen_here = 0;
    unlock_all(me)
#ifdef M_FOLD_LATER
    ; if :: stuck :: else -> take_words() fi
#endif
}

inline publish()                              /* *e->live = generation */
{
    atomic {
        log = PUBLISHED;
        do
        :: i < PAGES ->
            if
            :: cloning -> cloned = cloned | BIT(log_pfn[i])
            :: !cloning && log_kind[i] == KEEP && !HAS(cloned, was) -> limbo = was
            :: else
            fi;
            extent[i] = (logged[i] -> log_pfn[i] : extent[i]);
            i++
        :: else -> break
        od;
        i = 0
    }
}

inline commit(me)                             /* commit */
{
#ifndef M_LOCK_AFTER_LIVE
    lock_all(me);
#endif
    if
#ifndef M_NO_CONFLICT
    :: atomic { log_kind[0] == KEEP && private[0] && entry_pfn[0] != log_pfn[0] -> skip }       /* conflict: not published */
    :: atomic { !(log_kind[0] == KEEP && private[0] && entry_pfn[0] != log_pfn[0]) -> skip };
#else
    :: true ->
#endif
        publish();
#ifdef M_LOCK_AFTER_LIVE
        lock_all(me);
#endif
        b = 0;
        do                                    /* apply_all */
        :: b < BLOCKS -> apply_block(b); b++
        :: atomic { b == BLOCKS -> b = 0; break }
        od;
#ifdef M_UNLOCK_BEFORE_TELLING
        unlock_all(me);
#endif
        if                                    /* tell */
        :: moved -> tell(me, REMAP, 0, PAGES, 0); refresh(me, 0, PAGES, PEERS); moved = 0
        :: else
        fi
    fi;
#ifdef M_LOG_LEFT
    unlock_all(me)
#else
    log = DONE;
    unlock_all(me);
    atomic { log = NOLOG; log_owner = 0; reset_log() }
#endif
}

inline change(me)                             /* a transaction: clone the file, or (dedupe) move page 0 to a frame of the same content */
{
    begin(me);
    freeze(me);
    if
    :: stuck -> reset_log()
    :: else ->
        atomic {
            if
            :: cloning = 1
            :: f = next_frame; next_frame++;
                was = log_pfn[0];
                content[f] = content[was];
                frozen = frozen | BIT(f); cloned = cloned | BIT(f);
                log_kind[0] = KEEP; logged[0] = 1; log_pfn[0] = f; f = 0
            fi;
            log = WRITTEN; log_owner = NAME(me)     /* write_log */
        };
        commit(me);
        was = 0
    fi;
    finish()
}

#if SWEEPERS
inline sweep(me)                              /* freeze, and nothing is folded; then Spaces.strays */
{
    begin(me);
    freeze(me);
    atomic { was = log_pfn[0]; reset_log() };
    if
    :: atomic { entry_pfn[0] != was && extent[0] != was -> skip };      /* the look at the entries: nothing names it */
#ifndef M_SWEEP_AT_ONCE
        block_lock(me, 0);                    /* await_faults */
        block_unlock(0);
#endif
        atomic {
            do
            :: q < NS * PAGES -> assert(shown[q] != was); q++                   /* S5 */
            :: else -> break
            od;
            q = 0; freed = freed | BIT(was)
        }
    :: atomic { !(entry_pfn[0] != was && extent[0] != was) -> skip }
    fi;
    was = 0;
    finish()
}
#endif

inline map_file(me)                           /* Maps.map */
{
    begin(me);
#ifdef M_MAPPER_LATE
    mapped[me] = 1;
    refresh(me, 0, PAGES, PEERS);
    mappers = mappers | BIT(me);
#else
    mappers = mappers | BIT(me);              /* _attach */
    mapped[me] = 1;                           /* Engine.add */
    refresh(me, 0, PAGES, PEERS);
#endif
    finish()
}

inline reap(me)                               /* Mount.recover, Spaces.reap: redo, bury, slots.clear */
{
    begin(me);
    v = 0;
    do
    :: v < NS && HAS(gone & ~buried, v) ->
        mappers = mappers & ~BIT(v);          /* bury */
        b = 0;
        do
        :: b < BLOCKS && word[b] != 0 && SLOT_OF(word[b]) == v -> block_lock(me, b); block_unlock(b); b++
        :: atomic { b < BLOCKS && !(word[b] != 0 && SLOT_OF(word[b]) == v) -> b++ }
        :: atomic { b == BLOCKS -> b = 0; break }
        od;
        bell[v] = 0;
        atomic {
            buried = buried | BIT(v);
            if
            :: HAS(REUSE, v) && !HAS(reused, v) && threads[v] == 0 ->          /* slots.claim, by a new process */
                reused = reused | BIT(v); gone = gone & ~BIT(v); buried = buried & ~BIT(v);
                if
                :: threads[v] = 2; run Process(v); run Service(v)
                :: ended = ended | BIT(v)     /* one that maps nothing, and has no service thread */
                fi
            :: else
            fi
        };
        v++
    :: atomic { v < NS && !HAS(gone & ~buried, v) -> v++ }
    :: atomic { v == NS -> v = 0; break }
    od;
    finish()
}

proctype Process(byte me) provided (LIVES)
{
    byte p, rpfn, q, targets, a, b, i, f, was, saw, v;
    bool frozen_here, rprivate, moved, stuck, dead, copied;
    {
        HAS(PRESENT, me);
        if
        :: HAS(LATE, me) && !mapped[me] -> map_file(me)
        :: else
        fi;
        if
        :: HAS(WRITERS, me) -> store(me)
        :: HAS(CLONERS, me) ->
            do
            :: change(me);
                if
                :: stuck -> stuck = 0         /* and again */
                :: else -> break
                fi
            od
#if SWEEPERS
        :: HAS(SWEEPERS, me) -> sweep(me)
#endif
        :: !HAS(WRITERS | CLONERS | SWEEPERS, me)
        fi;
        if
        :: HAS(AFTER, me) -> store(me)
        :: else
        fi;
        if
        :: me == 2 ->                         /* and buries the dead */
            do
            :: gone & ~buried -> reap(me)
            :: atomic { (ended | buried | BIT(2)) == BIT(NS) - 1 && !(gone & ~buried) -> closing = 1; break }
            od
        :: else
        fi;
        ended = ended | BIT(me)
    } unless { HAS(gone, me) };
    atomic {
        p = 0; rpfn = 0; q = 0; targets = 0; a = 0; b = 0; i = 0; f = 0; was = 0; saw = 0; frozen_here = 0; v = 0;
        rprivate = 0; moved = 0; stuck = 0; dead = 0; copied = 0; threads[me]--
    }
}

proctype Killer()
{
    byte v, p;
    do
    :: atomic {
        kills < KILLS && !closing ->
        if
        :: HAS(DIE & PRESENT & ~(gone | ended), 0) -> v = 0
        :: HAS(DIE & PRESENT & ~(gone | ended), 1) -> v = 1
        :: HAS(DIE & PRESENT & ~(gone | ended), 3) -> v = 3
        fi;
        kills++;
        gone = gone | BIT(v);
        dying = (HAS(reused, v) -> BIT(11) | BIT(10) : BIT(6 + v) | BIT(2 + (v == 3 -> 2 : v)));
        transaction = (transaction == v + 1 -> 0 : transaction);
        mapped[v] = 0; guard[v] = 0;
#if !STALE
        bell[v] = 0;                          /* nobody will ever look */
#endif
        p = 0;
        do
        :: p < PAGES -> shown[AT(v, p)] = NONE; writable[AT(v, p)] = 0; p++
        :: else -> p = 0; break
        od
        };
        atomic { threads[v] == 0 -> dying = 0; v = 0 }
    :: atomic { kills == KILLS || closing -> break }
    od
}

active proctype Final()                       /* nobody can go on */
{
    byte q, p;
    timeout ->
    atomic {
        assert((ended | gone) == BIT(NS) - 1);                                /* nobody waits for ever */
        assert(transaction == 0 && log == NOLOG);
        assert((content[entry_pfn[0]] & stored) == stored);                   /* no store is lost */
        do
        :: p < PAGES ->
            assert(word[p / PPB] == 0 && owed[p / PPB] == 0 && !freezing[p]);
            assert(dirty[p] || extent[p] == entry_pfn[p]);
            assert(!(private[p] && HAS(frozen | cloned | freed, entry_pfn[p])));
            assert(p == 0 || entry_pfn[p] != entry_pfn[0]);
            q = 0;
            do
            :: q < NS && mapped[q] ->
                assert(shown[AT(q, p)] == entry_pfn[p] && (!writable[AT(q, p)] || private[p]));
                q++
            :: q < NS && !mapped[q] -> q++
            :: q == NS -> q = 0; break
            od;
            p++
        :: else -> break
        od
    }
}

init
{
    byte p, q;
    atomic {
        do
        :: p < PAGES -> entry_pfn[p] = p; extent[p] = p; p++
        :: else -> p = 0; break
        od;
        mappers = 11 & PRESENT & ~LATE; ended = BIT(NS) - 1 & ~PRESENT;
        threads[0] = 2; threads[1] = 2; threads[2] = 1; threads[3] = 2
    };
    atomic {
        if
        :: private[0] = 1                     /* the file's alone */
        :: true                               /* shared with another */
        fi;
        do
        :: q < NS && HAS(mappers, q) -> mapped[q] = 1; p = 0;
            do
            :: p < PAGES -> shown[AT(q, p)] = p; writable[AT(q, p)] = private[p]; p++
            :: else -> break
            od;
            q++
        :: q < NS && !HAS(mappers, q) -> q++
        :: q == NS -> p = 0; q = 0; break
        od;
        run Service(0); run Service(1); run Service(3); run Killer();             /* Killer knows these numbers */
        run Process(0); run Process(1); run Process(2); run Process(3)
    }
}
