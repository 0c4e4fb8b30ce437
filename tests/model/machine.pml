/* The machine under the queue: words of shared memory, store buffers, early and late loads, membarrier, futex, SIGKILL.
 *
 * Spin interleaves sequentially consistent steps; real processors do more. So every store of an end goes through its
 * store buffer, which the memory process drains: in order with TSO (x86-64), in any order of different addresses with
 * WEAK (aarch64). WEAK also lets a load happen elsewhere than at its place in the program, up to the next barrier:
 * early (`stale`: it returns what stood there before a change) or, for loads of the payload, late (`late_slot`).
 */

#if defined(TSO) == defined(WEAK)
#error "define either TSO (x86-64) or WEAK (aarch64)"
#endif

#define W 0        /* the writer; reader i is end i + 1 */
#define ENDS 3
#define DEPTH 4    /* of a store buffer; a store into a full one waits */

#define TAIL 0     /* messages published; the writer's */
#define EVENT 1    /* changes with every announcement; the writer's, after its death the readers' death watchers' */
#define PHASE 2    /* 1: closed; the writer's */
#define WANTED 3   /* 1: the writer waits for room; the writer's */
#define PAYLOAD 4  /* .. 5: number of the message whose bytes stand in that slot or block; the writer's */
#define CURSOR 6   /* .. 7: messages consumed; reader i's */
#define LEASE 8    /* .. 11: 1: reader i reads block b in place (at 2b + i); reader i's */
#define DEAD 12    /* .. 13: reader i is dead; the writer's process's own, set by its death watcher */
#define LOST 14    /* .. 15: the writer is dead; reader i's process's own, set by its death watcher */
#define BELL 16    /* 0: as the writer last read it, 1: anything else; as no ringer stores a value twice, that is all */
#define WORDS 17

byte mem[WORDS];
byte stale[ENDS * WORDS];   /* 0: none; else 1 + the value that this end's load may still return */
byte where[ENDS * DEPTH];   /* store buffers: addresses, values, number of entries */
byte what[ENDS * DEPTH];
byte pending[ENDS];
byte late_slot[ENDS];       /* 0: none; else 1 + the slot of a load still to be done, and the message it must find */
byte late_want[ENDS];
bool asleep[ENDS];          /* in FUTEX_WAIT: the writer on BELL, the readers on EVENT */
bool killed[ENDS];
bool finished[ENDS];        /* ended by itself */

hidden byte end_, a_, v_;  /* arguments of C functions */

c_code {
extern void (*uerror)(char *);

/* `end` loads from address `a`. Loads of EVENT and BELL done early return an older value: then FUTEX_WAIT returns. */
static int loads(int end, int a)
{
    if (a == TAIL || a == PHASE || a == WANTED || (a >= PAYLOAD && a < CURSOR))
        return end != W;
    if (a >= CURSOR && a < LOST)
        return end == W;
    return a >= LOST && a < BELL && a - LOST + 1 == end;
}

/* From now on `v` stands at `a`. Whoever loads `a` soon may have done so already. */
static void apply(int a, int v)
{
    int end;
#ifdef WEAK
    for (end = 0; end < ENDS; end++)
        if (now.mem[a] != v && !now.killed[end] && loads(end, a) && !now.stale[end * WORDS + a])
            now.stale[end * WORDS + a] = now.mem[a] + 1;
#endif
    now.mem[a] = v;
}

/* WEAK keeps the entries in order of address, and those of one address in order of time: only that can be seen. */
static void buffer(int end, int a, int v)
{
    unsigned char *where = now.where + end * DEPTH, *what = now.what + end * DEPTH;
    int k = now.pending[end]++;
#ifdef WEAK
    for (; k > 0 && where[k - 1] > a; k--)
        where[k] = where[k - 1], what[k] = what[k - 1];
#endif
    where[k] = a, what[k] = v;
}

/* Entry k of an end's store buffer becomes visible. */
static void drain(int end, int k)
{
    unsigned char *where = now.where + end * DEPTH, *what = now.what + end * DEPTH;
    apply(where[k], what[k]);
    for (now.pending[end]--; k < now.pending[end]; k++)
        where[k] = where[k + 1], what[k] = what[k + 1];
    where[k] = what[k] = 0;
}

static void check_payload(int found, int want)
{
    if (found < want)
        uerror("payload stale");
    if (found > want)
        uerror("payload overwritten");
}

static void do_late_load(int end)
{
    if (now.late_slot[end])
        check_payload(now.mem[PAYLOAD + now.late_slot[end] - 1], now.late_want[end]);
    now.late_slot[end] = now.late_want[end] = 0;
}

/* A full barrier on the processor of `end`: its stores are visible, its loads so far done, no later one done early. */
static void barrier(int end)
{
    while (now.pending[end])
        drain(end, 0);
    do_late_load(end);
    memset(now.stale + end * WORDS, 0, WORDS);
}

/* Nothing more is loaded; what its processor had stored still becomes visible. */
static void stop(int end)
{
    now.killed[end] = 1;
    now.asleep[end] = 0;
    now.late_slot[end] = now.late_want[end] = 0;
    memset(now.stale + end * WORDS, 0, WORDS);
}
}

/* ---- steps of an end ------------------------------------------------------------------------------------------- */

inline store(end, a, v) {
    d_step { pending[end] < DEPTH -> end_ = end; a_ = a; v_ = v; c_code { buffer(end_, a_, v_); } }
}

inline load(end, a, x) {
    atomic {
#ifdef WEAK
        if
        :: stale[end * WORDS + a] != 0 -> x = stale[end * WORDS + a] - 1
        :: true -> stale[end * WORDS + a] = 0; x = mem[a]
        fi
#else
        x = mem[a]
#endif
    }
}

/* x86-64 does loads in order and before later stores; aarch64 does them from when it could to when it must. */
inline load_payload(end, slot, want) {
#ifdef WEAK
    if
    :: stale[end * WORDS + PAYLOAD + slot] != 0 ->
        d_step { a_ = stale[end * WORDS + PAYLOAD + slot] - 1; v_ = want; c_code { check_payload(a_, v_); } }
    :: d_step {
        true ->
        stale[end * WORDS + PAYLOAD + slot] = 0;
        end_ = end;
        c_code { do_late_load(end_); };
        late_slot[end] = slot + 1;
        late_want[end] = want
       }
    fi
#else
    d_step { a_ = mem[PAYLOAD + slot]; v_ = want; c_code { check_payload(a_, v_); } }
#endif
}

inline barrier(end) { end_ = end; c_code { barrier(end_); } }

/* membarrier(GLOBAL_EXPEDITED) called by `end`: a barrier in the caller, in everybody, and in the caller once more.
 * One step, as the two ends that do not call share no word with each other unless one is the writer, whose barrier
 * comes after the readers': one that did not call may still have loaded early what the writer's drain then changes. */
inline membarrier(end) {
    d_step {
        barrier(end);
#ifndef MUT_READER_NOT_REGISTERED
        barrier(1);
#endif
        barrier(2);
        barrier(W);
        barrier(end)
    }
}

/* Kernel entries are full barriers for the caller. The kernel compares the word and queues under one lock. */
inline wake_readers(end) { d_step { barrier(end); asleep[1] = false; asleep[2] = false } }
inline wake_writer(end) { d_step { barrier(end); asleep[W] = false } }

/* The caller goes on at a statement that needs `!asleep[end]`. */
inline futex_wait(end, a, seen) { d_step { barrier(end); asleep[end] = (mem[a] == seen); seen = 0 } }

/* ---- what happens by itself ------------------------------------------------------------------------------------ */

#define DRAIN(end, k) d_step { pending[end] > k AFTER_##k(end) -> c_code { drain(end, k); } }

/* Stores to one address, which stand together, drain in order. */
#define AFTER_0(end)
#define AFTER_1(end) && where[end * DEPTH] != where[end * DEPTH + 1]
#define AFTER_2(end) && where[end * DEPTH + 1] != where[end * DEPTH + 2]
#define AFTER_3(end) && where[end * DEPTH + 2] != where[end * DEPTH + 3]

proctype memory() {
end_quiet:
    do
    :: DRAIN(0, 0)
    :: DRAIN(1, 0)
    :: DRAIN(2, 0)
#ifdef WEAK
    :: DRAIN(0, 1)
    :: DRAIN(1, 1)
    :: DRAIN(2, 1)
    :: DRAIN(0, 2)
    :: DRAIN(1, 2)
    :: DRAIN(2, 2)
    :: DRAIN(0, 3)
    :: DRAIN(1, 3)
    :: DRAIN(2, 3)
    :: d_step { late_slot[1] != 0 -> c_code { do_late_load(1); } }
    :: d_step { late_slot[2] != 0 -> c_code { do_late_load(2); } }
#endif
    od
}

#if defined(KILL_WRITER) || defined(KILL_READER)
/* SIGKILL at any step of its victim, which it does not survive: where nobody dies is another configuration. */
proctype killer(byte victim) {
end_killer:
    d_step { !finished[victim] -> end_ = victim; c_code { stop(end_); } }
}
#endif
