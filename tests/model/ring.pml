/* One queue of ray_shm/ring.py: a writer, two readers, parking on both sides, SIGKILL at any step.
 *
 * A ring of SLOTS messages; with ARENA the slots are arena blocks, which readers may also lease and read in place. The
 * writer publishes MESSAGES messages and closes. What a step does to memory is in machine.pml. SYNC POINTs have their
 * names in ray_shm/. `-DMUT_...` takes away one thing that the argument needs; README.md lists them.
 *
 * One atomic step holds at most one load, barrier or kernel call, and maybe a store after it: that goes into the
 * process's own buffer, so nobody can tell it from a later one. A process is killed between steps.
 */

#ifndef SLOTS
#define SLOTS 1
#endif
#ifndef MESSAGES
#define MESSAGES 3
#endif
#ifndef READERS
#define READERS 2
#endif

byte received[2];  /* messages that reader i took */

#define W 0        /* the writer; reader i is end i + 1 */
#define ENDS 3

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
#define LATE_LOADS 1
#define LATE_LOAD(slot) 0
#define DO_LATE_LOADS DO_LATE_LOAD(1) DO_LATE_LOAD(2)

c_code {
/* `end` loads from address `a`. Loads of EVENT and BELL done early return an older value: then FUTEX_WAIT returns. */
static int loads(int end, int a)
{
    if (a == TAIL || a == PHASE || a == WANTED || (a >= PAYLOAD && a < CURSOR))
        return end != W;
    if (a >= CURSOR && a < LOST)
        return end == W;
    return a >= LOST && a < BELL && a - LOST + 1 == end;
}
}

#include "machine.pml"

/* ---- kernel calls ---------------------------------------------------------------------------------------------- */

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

/* Which ends are at risk of SIGKILL: they, and their watchers, take no step after it. */
#ifdef KILL_WRITER
#define WRITER_KILLED unless { atomic { killed[W] -> x = 0; m = 0; limit = 0; low = 0; leased = false } }
#else
#define WRITER_KILLED
#endif
#ifdef KILL_READER
#define READER_KILLED unless { atomic { killed[p] -> x = 0; seen = 0; ended = false; held = 0 } }
#else
#define READER_KILLED
#endif

#include "fences.pml"

/* ---- writer ---------------------------------------------------------------------------------------------------- */

/* Reader i's word into x, and what to note of it. */
#if !defined(KILL_READER) || defined(MUT_DEAD_COUNTS)
#define LOOK(i, word, note) load(W, word + i, x); note; x = 0;
#else
/* A dead reader's words no longer count; the queue then goes on without it, or ends. */
#define LOOK(i, word, note) \
    load(W, DEAD + i, x); \
    if \
    :: x == 0 -> load(W, word + i, x); note \
    :: x != 0 \
    :: x != 0 -> refused = true \
    fi; \
    x = 0;
#endif

#if READERS > 1
#define LOOK_AT_BOTH(word, note) LOOK(0, word, note) LOOK(1, word, note)
#else
#define LOOK_AT_BOTH(word, note) LOOK(0, word, note)
#endif

/* low: the slowest cursor. Both readers in one step: one by one finds no more, as cursors only grow. */
inline look_at_cursors() {
    low = MESSAGES;
    LOOK_AT_BOTH(CURSOR, if :: x < low -> low = x :: x >= low fi)
}

#ifdef ARENA

/* In one step too: once all cursors are past a message, its leases only end. */
inline look_at_leases() { LOOK_AT_BOTH(LEASE + 2 * (m % SLOTS), leased = leased || x != 0) }

/* A block is free when all cursors are past its message, and no lease is left. */
inline reserve(guard, n) {
#ifdef MUT_LEASES_BEFORE_CURSORS
    atomic { guard -> look_at_leases() }
    F(W)
    atomic { look_at_cursors() }
#else
    atomic { guard -> look_at_cursors() }
    F_CURSORS_BEFORE_LEASES
    atomic { look_at_leases() }
#endif
    if
    :: m + n <= low + SLOTS && !leased ->
        /* SYNC POINT: cursors before reuse. Here that is: cursors, a fence, lease words, a fence, reuse. */
        atomic { F_CURSORS_BEFORE_REUSE limit = m + 1; low = 0 }
    :: m + n > low + SLOTS || leased -> atomic { low = 0; leased = false }
    fi
}

#else

/* Messages up to number `limit` find room. Without room for n more the limit stays as it was last fenced. */
inline reserve(guard, n) {
    atomic { guard -> look_at_cursors() }
    if
    :: m + n <= low + SLOTS ->
        /* SYNC POINT: cursors before reuse */
        atomic { F_CURSORS_BEFORE_REUSE limit = low + SLOTS; low = 0 }
    :: m + n > low + SLOTS ->
        atomic {
#ifdef MUT_LIMIT_BEFORE_FENCE
            limit = low + SLOTS;
#endif
            low = 0
        }
    fi
}

#endif

inline wait_for_room() {
    /* SYNC POINT: wanted before cursors */
    store(W, WANTED, 1);
    MB_WANTED_BEFORE_CURSORS
    do
        /* SYNC POINT: word before state. The value now in the bell is called 0. */
    :: atomic { !asleep[W] -> mem[BELL] = seen }
        reserve(true, 1);
        if
        :: m < limit || refused -> break
        :: m == limit && !refused -> futex_wait(W, BELL, seen)
        fi
    od;
    store(W, WANTED, 0)
}

inline announce(value) {
#ifndef MUT_WAKE_SAME_WORD
    store(W, EVENT, value);
#endif
#ifdef MUT_WAKE_AT_CLOSE_ONLY
    if :: value > MESSAGES -> wake_readers(W) :: value <= MESSAGES fi
#else
    wake_readers(W)
#endif
}

inline publish() {
#ifdef MUT_CURSOR_BEFORE_PAYLOAD
    atomic { m < limit && m < MESSAGES -> F(W) store(W, TAIL, m + 1) }
    store(W, PAYLOAD + m % SLOTS, m + 1);
    m++;
#else
    atomic { m < limit && m < MESSAGES -> store(W, PAYLOAD + m % SLOTS, m + 1) }
    /* SYNC POINT: payload before tail */
    atomic { F_PAYLOAD_BEFORE_TAIL store(W, TAIL, m + 1); m++ }
#endif
    /* SYNC POINT: tail before event */
    F_TAIL_BEFORE_EVENT
    announce(m)
}

proctype writer() {
    byte m, limit, low, x, seen;
    bool leased, refused;
    {
#ifndef ARENA
        limit = SLOTS;
#endif
        do
        :: publish()
        :: reserve(m == limit && m < MESSAGES, 1);
            if
            :: m == limit && !refused -> wait_for_room()
            :: m < limit || refused
            fi;
            if
            :: refused -> break
            :: !refused
            fi
#if SLOTS > 1 && !defined(ARENA)
        :: reserve(m < MESSAGES, 2)  /* a larger message, which gives up (TimeoutError) */
#endif
#ifndef KILL_WRITER
        :: true ->  /* a pause until nothing moves: nobody may have missed the last announcement */
            timeout;
            assert((killed[1] || received[0] == m) && (READERS == 1 || killed[2] || received[1] == m))
#endif
        :: m == MESSAGES -> break
        od;
        store(W, PHASE, 1);
        F(W)
        announce(m + 1);
        finished[W] = true
    } WRITER_KILLED
}

/* ---- reader ---------------------------------------------------------------------------------------------------- */

#define MINE (p - 1)

inline ring() {
    load(p, WANTED, x);
    if
    :: x != 0 ->
        /* SYNC POINT: tail before event. Here that is the cursor and the bell. */
        atomic {
            F_CURSOR_BEFORE_BELL
#ifndef MUT_RING_SAME_WORD
            store(p, BELL, 1);
#endif
            x = 0
        }
        wake_writer(p)
    :: x == 0
    fi
}

#ifdef ARENA
#ifdef ONE_LEASES
#define LEASES (p == 2)
#else
#define LEASES true
#endif

/* A lease is taken before the cursor moves and given back when the last read is done. `held`: its message, or 0. */
inline store_lease(value) { store(p, LEASE + 2 * ((held - 1) % SLOTS) + MINE, value) }

inline take() {
    if
    :: held == 0 && LEASES ->
        held = received[MINE] + 1;
#ifndef MUT_LEASE_AFTER_CURSOR
        store_lease(1)
#endif
    :: true -> load_payload(p, received[MINE] % SLOTS, received[MINE] + 1)  /* copy out */
    fi
}

inline give_back() {
    atomic {
        load_payload(p, (held - 1) % SLOTS, held);
        /* SYNC POINT: reads before cursor. A lease word says the same of its block. */
        store_lease(0);
        held = 0
    }
    ring()
}
#else
#define take() load_payload(p, received[MINE] % SLOTS, received[MINE] + 1)
#endif

inline consume() {
    /* SYNC POINT: payload before tail */
    atomic {
        x != received[MINE] ->
        x = 0;
        seen = 0;
        ended = false;
#ifdef MUT_CURSOR_BEFORE_READS
        store(p, CURSOR + MINE, received[MINE] + 1)
    }
    atomic {
        take();
        received[MINE]++
#else
        take();
        received[MINE]++;
        /* SYNC POINT: reads before cursor */
        store(p, CURSOR + MINE, received[MINE])
#endif
    }
#ifdef MUT_LEASE_AFTER_CURSOR
    if :: held == received[MINE] -> store_lease(1) :: held != received[MINE] fi;
#endif
    ring()
}

/* One step, as what has ended stays so. */
inline look_at_end() {
    atomic {
        load(p, PHASE, ended);
#ifdef KILL_WRITER
        if
        :: ended
        :: !ended -> load(p, LOST + MINE, ended)
        fi
#endif
    }
}

/* ring.py looks at the tail first and at the other words only before it sleeps; looking at them always adds nothing. */
proctype reader(byte p) {
    byte x, seen, held;
    bool ended;
    {
        do
#ifdef MUT_STATE_BEFORE_WORD
        :: atomic { !asleep[p] -> look_at_end() }
            load(p, TAIL, x);
            seen = mem[EVENT];
#elif defined(MUT_TAIL_BEFORE_END)
        :: atomic { !asleep[p] -> seen = mem[EVENT] }
            load(p, TAIL, x);
            look_at_end();
#else
            /* SYNC POINT: word before state. And the end before the tail: what has ended has published its last. */
        :: atomic { !asleep[p] -> seen = mem[EVENT] }
            look_at_end();
            load(p, TAIL, x);
#endif
            if
            :: consume()
            :: atomic { x == received[MINE] && held == 0 && !ended -> x = 0; futex_wait(p, EVENT, seen) }
            :: atomic {
                x == received[MINE] && held == 0 && ended ->
                assert(received[MINE] == mem[TAIL]);  /* all that was completely published */
                x = 0;
                ended = false;
                finished[p] = true;
                break
               }
#ifdef ARENA
            :: atomic { x == received[MINE] && held != 0 -> x = 0; seen = 0; ended = false }
#endif
            fi
#ifdef ARENA
        :: held != 0 -> give_back()
#endif
        od
    } READER_KILLED
}

/* ---- death watchers -------------------------------------------------------------------------------------------- */

/* A thread of each process. A pidfd tells of a death only once all that the dead process stored is visible. */

#ifdef KILL_READER
proctype watcher_of_writer() {
end_watching:
    {
        d_step { killed[READERS] && pending[READERS] == 0 -> a_ = DEAD + READERS - 1; c_code { apply(a_, 1); } }
        atomic { F_FLAG_BEFORE_WORD mem[BELL] = 1; asleep[W] = false }
    } unless { killed[W] }
}
#endif

#ifdef KILL_WRITER
proctype watcher_of_reader(byte p) {
end_watching:
    {
#ifdef MUT_LOST_AFTER_WAKE
        atomic { killed[W] && pending[W] == 0 -> mem[EVENT] = MESSAGES + 1 + p; asleep[1] = false; asleep[2] = false }
        d_step { a_ = LOST + MINE; c_code { apply(a_, 1); } }
#else
        atomic {
            killed[W] && pending[W] == 0 ->
            F_TAIL_BEFORE_LOST
            d_step { a_ = LOST + MINE; c_code { apply(a_, 1); } }
        }
        atomic { F_FLAG_BEFORE_WORD mem[EVENT] = MESSAGES + 1 + p; asleep[1] = false; asleep[2] = false }
#endif
    } unless { killed[p] }
}
#endif

init {
    atomic {
        run memory();
        run writer();
        run reader(1);
#if READERS > 1
        run reader(2);
#endif
#ifdef KILL_WRITER
        run watcher_of_reader(1);
#if READERS > 1
        run watcher_of_reader(2);
#endif
        run killer(W);
#endif
#ifdef KILL_READER
        run watcher_of_writer();
        run killer(READERS);
#endif
    }
}
