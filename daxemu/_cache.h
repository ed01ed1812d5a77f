/*
 * The buffer cache: frames in memory for the blocks of a device that can only be read and written. See _fault.h for the rest.
 *
 * The frame file (in /dev/shm) is as long as the device, and longer, and nearly all hole: block b of device d has the frame at index d * SPAN + b,
 * so the kernel's own index of that file is the index from (device, block) to frame, and an address space's entries are
 * PFNs of the pool as they are without a cache. All that we say of a frame is one word at the same index in the control file.
 *
 * - A frame that has no page is *absent*. All mappings of frames are registered with userfaultfd (UFFD_FEATURE_SIGBUS): a touch of
 *   an absent frame is a SIGBUS, never a page of zeros. The handler reads the block, and the store goes on.
 * - A frame's page comes and goes only while its word is held (HOLDER). To punch the page out of the frame file takes it out
 *   of all processes' page tables at once: the kernel does that shootdown.
 * - RESIDENT in a held word means: should the holder die, the page is the truth. It is cleared before the page is punched, and set after
 *   the page is filled; whoever takes over from the dead punches a frame that isn't RESIDENT.
 * - WRITABLE: some process may have the frame mapped for storing; so it is DIRTY, and before it is written back for good all are told (PROTECT).
 *   A process maps a frame for storing under its guard, and only if the word is WRITABLE and not held: who holds it has told everybody after
 *   that, and so undoes it, or before, and is seen.
 * - KEPT: a tree node of an unfinished generation, stored to through memory: it stays until it is written back.
 * - Nobody waits for a word while holding another one, but for a block's while holding the copy of it that is an inode's (policy per-inode).
 *   Who makes room only tries. So waiting makes no circle.
 */
#ifndef ONECOPY_CACHE_H
#define ONECOPY_CACHE_H

#include "_device.h"
#include "_fault.h"

#define DEVICES 8u
#define SPAN (1ull << 31)    /* frames of one device: half for its blocks, half for copies that are inodes' */
#define COPIES (1ull << 30)  /* where these begin */
#define USERS 512u
#define AHEAD 64u            /* blocks read at once, at the most */

#define F_HOLDER 0x7fffffffull
#define F_WAITED (1ull << 31)
#define F_RESIDENT (1ull << 32)
#define F_DIRTY (1ull << 33)
#define F_KEPT (1ull << 34)
#define F_WRITABLE (1ull << 35)
#define F_MAIN (1ull << 36)
#define F_FREQ (3ull << 37)
#define F_FREQ_ONE (1ull << 37)
#define F_STAMP 48 /* 16 bits: when it came in, or, of one that is absent, went; in parts of the cache */

struct cache_header { /* at the start of the control file; blkcache/cache.py declares it, too, and a test compares */
    uint64_t magic, layout;
    uint64_t limit;    /* frames */
    uint64_t hand;     /* of the sweep: counts frames */
    uint64_t inserted, evicted, fills, hits, written, errors, over;
    uint64_t mains;    /* of the resident: used again; see _evict.c */
    uint64_t users;    /* one more than the highest user number ever */
    uint64_t unused[2];
    uint64_t identities[DEVICES * 4]; /* of the pools: uuid, st_dev, st_ino */
    uint64_t frames[DEVICES]; /* of each device; 0: none */
    uint64_t kept[DEVICES];   /* frames of each that stay until they are written back */
    uint64_t copies[DEVICES]; /* frames of each that inodes' copies have been given, ever */
    uint64_t incarnations[USERS];
    uint64_t promised[USERS]; /* frames that each user may be about to give pages */
};
#define WORDS_AT (1ull << 20)                        /* bytes into the control file */
#define OWNERS_AT (WORDS_AT + DEVICES * SPAN * 8)    /* per frame of a device: who may store there, space << 32 | page */
#define WINDOWS_AT (OWNERS_AT + DEVICES * COPIES * 8) /* per device and space: first frame of the inode's copies, 0: none; how many */

struct cache {
    struct cache *next;
    struct cache_header *header;
    uint64_t *words;   /* of all devices */
    uint64_t *owners, *windows, *kept; /* of ours */
    char *pool;        /* our device's frames, mapped, registered */
    struct device *device; /* lives as long as the Cache */
    struct engine *engine; /* who tells others; NULL while the cache is used by no engine */
    uint64_t base, frames;
    int control_fd, frames_fd, uffd;
    uint32_t holder;
    char *bounce;
    uint32_t bounced, returned;
    /* Blocks that could not be read for the pool's own mapping, which shows zeros there until it is asked about them; see _absent.c. */
    uint8_t *lost;     /* a bit for each */
    uint32_t shown;    /* how many are set */
    uint32_t losses;   /* twice as many as there were ever; odd while one is being made: under the guard */
    int failed;        /* errno of the last one; and which it was */
    uint64_t failed_block;
    uint32_t evicting;
    uint64_t stuck;    /* ms: until then nobody is asked to stop storing, as somebody did not answer */
    int closed, read_only; /* the device, for us: what is dirty is others' to evict */
    int child_fd;
    uint32_t child_holder;
};

/* Held frames, see above. frame_hold without `wait`: 0 when somebody else holds it. *flags: what the word says. */
int frame_hold(const struct cache *c, uint64_t i, int wait, uint64_t *flags);
void frame_release(const struct cache *c, uint64_t i, uint64_t flags);
void frame_note(const struct cache *c, uint64_t i, uint64_t flags); /* what who takes over from us shall find */
int frame_is_block(const struct cache *c, uint64_t i);              /* of our device; not a copy, not another's */
uint64_t frame_came_in(const struct cache *c, uint64_t before);     /* flags of one that has been filled */
void frame_left(const struct cache *c, uint64_t flags);              /* one that had these is absent now */
void frames_punch(const struct cache *c, uint64_t i, uint64_t frames);
int frames_write(struct cache *c, uint64_t i, uint64_t frames);     /* held, of our device */
uint64_t frames_evict(struct cache *c, uint64_t want);              /* as many as can be; returns how many could not. _evict.c */

/* Filling, in _cache.c. How many frames have a page is what the frame file takes up: nothing that the dead can leave wrong. To it come
 * promises: each is made before frames get pages, and lasts until they are released. Where there are too many, others go first. */
int frames_promise(struct cache *c, uint64_t frames); /* 0 when nothing could go, and there are too many */
uint64_t frames_over(const struct cache *c);
uint64_t frames_pages(const struct cache *c); /* that there are */
void frames_unpromise(const struct cache *c, uint64_t frames);
int frames_fill(struct cache *c, uint64_t i, uint64_t pfn, uint64_t frames); /* held, absent */
int frames_put(const struct cache *c, uint64_t i, uint64_t frames, const char *from);
char *bounce_take(struct cache *c, uint32_t *which); /* AHEAD pages that device_read may read into */
void bounce_give(struct cache *c, uint32_t which);

int cache_watch(struct cache *c, void *address, uint64_t length);
int cache_show(struct cache *c, uint64_t pfn, uint64_t pages); /* in the pool's own mapping, where zeros were; takes the guard */
int cache_show_page(struct cache *c, const char *address);     /* the same, of a touch, under the guard: 0, or errno; -1: it can't */
uint64_t cache_frame(const struct cache *c, uint32_t space, uint64_t page, uint64_t word); /* index of what a mapping shows */
/* Make frame `i` resident, whose content is block `pfn`'s, and up to `ahead` frames behind it that are absent, too. Of copies,
 * `entries` says what they are of; when it has changed, nothing happens. 0 or errno. */
int cache_is_there(struct cache *c, uint64_t i); /* and count a use; holds nothing */
int cache_need(struct cache *c, uint64_t i, uint64_t pfn, uint64_t ahead, const uint64_t *entries);
void cache_moved(struct cache *c, uint32_t space, uint64_t page, uint64_t pages); /* entries have changed: copies count no more */
int cache_store(struct cache *c, uint64_t offset, const char *from, uint64_t size);
int cache_copy(struct cache *c, uint64_t from, uint64_t to); /* one page between blocks; `from` 0: zeros */
int cache_clear(struct cache *c, uint64_t pfn, uint64_t first, uint64_t end);
int cache_ready(struct cache *c, uint64_t pfn, uint64_t pages);
int cache_own(struct cache *c, uint32_t space, uint64_t page, uint64_t pfn, uint64_t pages);
int cache_may_write(const struct cache *c, uint64_t pfn);
int cache_write_back(struct cache *c, uint64_t pfn, uint64_t pages);
void cache_trim(struct cache *c);
void cache_drop(struct cache *c, uint64_t i, uint64_t pages);
int cache_join(int control_fd, struct cache_header *header, uint32_t *holder);
int cache_watching(void);                 /* a new userfaultfd, or -errno */
void cache_in_child(struct cache *c);     /* at fork: this process is one of its own */

/* _guard.c: the caches of this process */
void caches_add(struct cache *c);
void caches_remove(struct cache *c);
void caches_without(struct engine *e);    /* it is about to be closed: what is evicted from now on, is without it */
struct cache *cache_around(const char *address); /* whose pool is mapped there; under the guard */

#endif
