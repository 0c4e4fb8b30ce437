/* The machine under the protocols: words of shared memory, store buffers, early and late loads, barriers, SIGKILL.
 *
 * Spin interleaves sequentially consistent steps; real processors do more. So every store of an end goes through its
 * store buffer, which the memory process drains: in order with TSO (x86-64), in any order of different addresses with
 * WEAK (aarch64). WEAK also lets a load happen elsewhere than at its place in the program, up to the next barrier:
 * early (`stale`: it returns what stood there before a change) or, for loads of the payload, late (`late_slot`).
 *
 * Who includes this has defined ENDS, WORDS and PAYLOAD (the first word of it); LATE_LOADS (of one end, at most),
 * LATE_LOAD(slot) (which of them is that slot's) and DO_LATE_LOADS (all of them); and the C function loads(end, a).
 */

#if defined(TSO) == defined(WEAK)
#error "define either TSO (x86-64) or WEAK (aarch64)"
#endif

#define DEPTH 4    /* of a store buffer; a store into a full one waits */

byte mem[WORDS];
byte stale[ENDS * WORDS];   /* 0: none; else 1 + the value that this end's load may still return */
byte where[ENDS * DEPTH];   /* store buffers: addresses, values, number of entries */
byte what[ENDS * DEPTH];
byte pending[ENDS];
byte late_slot[ENDS * LATE_LOADS];  /* 0: none; else 1 + the slot of a load still to be done, and what it must find */
byte late_want[ENDS * LATE_LOADS];
byte asleep[ENDS];          /* in FUTEX_WAIT */
bool killed[ENDS];
bool finished[ENDS];        /* ended by itself */

hidden byte end_, a_, v_;  /* arguments of C functions */

c_code {
extern void (*uerror)(char *);

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

static void do_late_load(int n)
{
    if (now.late_slot[n])
        check_payload(now.mem[PAYLOAD + now.late_slot[n] - 1], now.late_want[n]);
    now.late_slot[n] = now.late_want[n] = 0;
}

/* A full barrier on the processor of `end`: its stores are visible, its loads so far done, no later one done early. */
static void barrier(int end)
{
    int n;
    while (now.pending[end])
        drain(end, 0);
    for (n = end * LATE_LOADS; n < (end + 1) * LATE_LOADS; n++)
        do_late_load(n);
    memset(now.stale + end * WORDS, 0, WORDS);
}

/* Nothing more is loaded; what its processor had stored still becomes visible. */
static void stop(int end)
{
    now.killed[end] = 1;
    now.asleep[end] = 0;
    memset(now.late_slot + end * LATE_LOADS, 0, LATE_LOADS);
    memset(now.late_want + end * LATE_LOADS, 0, LATE_LOADS);
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
        end_ = end * LATE_LOADS + LATE_LOAD(slot);
        c_code { do_late_load(end_); };
        late_slot[end_] = slot + 1;
        late_want[end_] = want
       }
    fi
#else
    d_step { a_ = mem[PAYLOAD + slot]; v_ = want; c_code { check_payload(a_, v_); } }
#endif
}

inline barrier(end) { end_ = end; c_code { barrier(end_); } }

/* ---- what happens by itself ------------------------------------------------------------------------------------ */

#define DRAIN(end, k) d_step { pending[end] > k AFTER_##k(end) -> c_code { drain(end, k); } }

/* Stores to one address, which stand together, drain in order. */
#define AFTER_0(end)
#define AFTER_1(end) && where[end * DEPTH] != where[end * DEPTH + 1]
#define AFTER_2(end) && where[end * DEPTH + 1] != where[end * DEPTH + 2]
#define AFTER_3(end) && where[end * DEPTH + 2] != where[end * DEPTH + 3]

#define DO_LATE_LOAD(n) :: d_step { late_slot[n] != 0 -> c_code { do_late_load(n); } }

#ifdef WEAK
#define DRAIN_ANY(end) :: DRAIN(end, 0) :: DRAIN(end, 1) :: DRAIN(end, 2) :: DRAIN(end, 3)
#else
#define DRAIN_ANY(end) :: DRAIN(end, 0)
#endif

proctype memory() {
end_quiet:
    do
    DRAIN_ANY(0)
    DRAIN_ANY(1)
#if ENDS > 2
    DRAIN_ANY(2)
#endif
#if ENDS > 3
    DRAIN_ANY(3)
#endif
#ifdef WEAK
    DO_LATE_LOADS
#endif
    od
}

#if defined(KILL_WRITER) || defined(KILL_READER) || defined(KILL)
/* SIGKILL at any step of its victim, which it does not survive: where nobody dies is another configuration. */
proctype killer(byte victim) {
end_killer:
    d_step { !finished[victim] -> end_ = victim; c_code { stop(end_); } }
}
#endif
