/* The small collectives of ray_shm/node_exchange.py: two or three ranks, their lines and areas, parking, the end.
 *
 * All ranks go through the same steps, at most STEPS, of any kind that an operation has; which, and how many, the first
 * to begin a step chooses. What a step does to memory is in machine.pml. SYNC POINTs have their names in ray_shm/.
 * `-DMUT_...` takes away one thing that the argument needs; README.md lists them.
 *
 * One atomic step holds at most one load, barrier or kernel call, and maybe a store after it: that goes into the
 * process's own buffer, so nobody can tell it from a later one. The areas of the others are read in one step, as nobody
 * looks at what another has read.
 */

#ifndef RANKS
#define RANKS 2
#endif
#ifndef STEPS
#define STEPS 4
#endif
#ifndef MENU
#define MENU 63  /* steps to choose from: 1: GATHER, 2: FIRST and SECOND, 4: MEET, 8 << r: SEND + r */
#endif

/* What is done in a step. FIRST and SECOND: an all_reduce by slices. SEND + r: a broadcast from rank r. */
#define GATHER 1
#define FIRST 2
#define SECOND 3
#define MEET 4
#define STOP 5  /* nobody begins this step */
#define SEND 6

#define ENDS RANKS
#if defined(KILL) || defined(RELEASE) || defined(LEAVE)
#define MAY_END
#endif

#define ARRIVED 0         /* .. 2: the step that rank r has come to; the rank's */
#define PAYLOAD 3         /* .. 8: the step whose bytes stand in the area of rank r at 2r + parity; the rank's */
#define OVER 9            /* 1: the group has ended; of whoever ends it */
#define EVENT 10          /* .. 12: bit p: rank p has read the value that stands in the event of rank r. As no value is
                           * stored twice, a store clears all bits; the rank's, and of whoever ends the group */
#ifdef WHATS
#define WHAT 13           /* .. 24: number of the step whose `what` stands at 4r + step modulo 4; the rank's */
#define WORDS 25
#ifdef MUT_TWO_WHATS
#define WHAT_OF(q, step) WHAT + 4 * q + ((step) & 1)
#else
#define WHAT_OF(q, step) WHAT + 4 * q + ((step) & 3)
#endif
#else
#define WORDS 13
#endif
#define LATE_LOADS RANKS  /* one area of each other rank */
#define LATE_LOAD(slot) ((slot) / 2)
#if RANKS == 2
#define DO_LATE_LOADS DO_LATE_LOAD(1) DO_LATE_LOAD(2)
#else
#define DO_LATE_LOADS DO_LATE_LOAD(1) DO_LATE_LOAD(2) DO_LATE_LOAD(3) DO_LATE_LOAD(5) DO_LATE_LOAD(6) DO_LATE_LOAD(7)
#endif

byte at[RANKS];        /* the step that rank r is in */
byte kind[STEPS + 2];  /* of the steps that somebody is in; 0: not chosen, or all are past it */
byte leaver;           /* 0: none; else 1 + the rank that has ended the group, or is about to */

c_code {
/* `end` loads from address `a`. Loads of an event done early return an older value: then FUTEX_WAIT returns. */
static int loads(int end, int a)
{
    if (a >= PAYLOAD && a < OVER)
        return (a - PAYLOAD) / 2 != end;
#ifdef WHATS
    if (a >= WHAT)
        return (a - WHAT) / 4 != end;
#endif
    return a < EVENT && a != end;
}
}

#include "machine.pml"

#ifdef KILL
/* The rank takes no step after it. */
#define KILLED \
    unless { \
        atomic { \
            killed[p] -> \
            x = 0; \
            r = 0; \
            reached = 0; \
            lost = false; \
            at[p] = STEPS + 1; \
            forget_event(p, EVENT); \
            forget_event(p, EVENT + 1); \
            forget_event(p, EVENT + 2) \
        } \
    }
#else
#define KILLED
#endif

/* ---- fences and kernel calls ----------------------------------------------------------------------------------- */

/* FENCE(p, then) is `futex.fence` and what p does next. Nothing on x86-64, where program order is enough. On aarch64 a
 * membarrier: a barrier in the caller, one in every rank, in any order, as they look at each other's words, and one in
 * the caller once more. The threads that end a group load nothing, and need none (NOBODY). */
#define NOBODY RANKS
#ifdef WEAK
#define BARRIER(p) if :: p < RANKS -> barrier(p) :: p >= RANKS fi;
#define REACH(p, q, then) \
    :: atomic { \
        q != p && !(reached & BIT(q)) -> \
        d_step { BARRIER(p) barrier(q); BARRIER(p) reached = reached | BIT(q) } \
        if \
        :: ((reached | BIT(p)) & ALL_RANKS) == ALL_RANKS -> reached = 0; then; break \
        :: else \
        fi \
       }
#if RANKS == 2
#define FENCE(p, then) do REACH(p, 0, then) REACH(p, 1, then) od
#else
#define FENCE(p, then) do REACH(p, 0, then) REACH(p, 1, then) REACH(p, 2, then) od
#endif
#else
#define FENCE(p, then) atomic { then }
#endif
#define NO_FENCE(p, then) atomic { then }
#define BIT(p) (1 << (p))
#define ALL_RANKS (BIT(RANKS) - 1)

#ifndef MUT_NO_PAYLOAD_FENCE
#define F_PAYLOAD_BEFORE_ARRIVED FENCE
#else
#define F_PAYLOAD_BEFORE_ARRIVED NO_FENCE
#endif

#ifndef MUT_NO_ARRIVED_FENCE
#define F_ARRIVED_BEFORE_EVENT FENCE
#else
#define F_ARRIVED_BEFORE_EVENT NO_FENCE
#endif

/* Either of these is enough: that of who is to overwrite, or that before the arrival of who has read. The package has
 * both, as the latter is F_PAYLOAD_BEFORE_ARRIVED, here of those who write nothing. */
#if !defined(MUT_NO_READS_FENCE) && !defined(ONLY_READERS_FENCE)
#define F_READS_BEFORE_ARRIVAL FENCE
#else
#define F_READS_BEFORE_ARRIVAL NO_FENCE
#endif
#if !defined(MUT_NO_READS_FENCE) && !defined(ONLY_WRITERS_FENCE)
#define F_OF_READER F_PAYLOAD_BEFORE_ARRIVED
#else
#define F_OF_READER NO_FENCE
#endif

#ifndef MUT_NO_LAST_FENCE
#define F_LAST_BEFORE_OVER FENCE
#else
#define F_LAST_BEFORE_OVER NO_FENCE
#endif

/* Kernel entries are full barriers for the caller. The kernel compares the word and queues under one lock. */
#if RANKS == 2
#define WAKE_THIRD(a)
#else
#define WAKE_THIRD(a) WAKE_RANK(2, a)
#endif
#define WAKE_RANK(q, a) if :: asleep[q] == a -> asleep[q] = 0 :: asleep[q] != a fi;
#define WAKE(a) WAKE_RANK(0, a) WAKE_RANK(1, a) WAKE_THIRD(a)

/* The caller goes on at a statement that needs `!asleep[me]`. */
inline load_event(me, a) { mem[a] = mem[a] | BIT(me) }
inline forget_event(me, a) { mem[a] = mem[a] & (15 - BIT(me)) }
inline futex_wait(me, a) {
    d_step {
        barrier(me);
        if
        :: mem[a] & BIT(me) -> asleep[me] = a; forget_event(me, a)
        :: else
        fi
    }
}

#ifdef MUT_WAKE_SAME_WORD
#define NEW_VALUE(store) skip
#else
#define NEW_VALUE(store) store
#endif

/* ---- the end of a group ---------------------------------------------------------------------------------------- */

/* Whoever ends the group loads nothing meanwhile. So a store that waits in its buffer is one that it makes later. */
inline apply(a, v) { d_step { a_ = a; v_ = v; c_code { apply(a_, v_); } } }

#define RING_FOR_END(r) \
    /* SYNC POINT: arrived before event. Here, the end of the group. */ \
    F_ARRIVED_BEFORE_EVENT(NOBODY, NEW_VALUE(apply(EVENT + r, 0)); d_step { WAKE(EVENT + r) skip });

inline ring_all() {
    RING_FOR_END(0)
    RING_FOR_END(1)
#if RANKS > 2
    RING_FOR_END(2)
#endif
}

inline end_group() {
#ifdef MUT_RING_BEFORE_OVER
    ring_all();
    F_LAST_BEFORE_OVER(NOBODY, apply(OVER, 1))
#else
    F_LAST_BEFORE_OVER(NOBODY, apply(OVER, 1));
    ring_all()
#endif
}

/* ---- waits ----------------------------------------------------------------------------------------------------- */

/* x: 0: the word is to be read, 1: the rank has not come, 2: nor has the group ended, 3: the group has ended */

#define FIRST_OTHER (p == 0)
#define LAST RANKS - 1

/* Has rank r come? Then the next that is waited for, or the end of the wait. */
#define LOOK(last, if_not) \
    load(p, ARRIVED + r, x); \
    if \
    :: x >= step -> HAS_COME(last) \
    :: x < step -> x = if_not \
    fi
#define HAS_COME(last) \
    forget_event(p, EVENT + r); \
    x = 0; \
    r = (r + 1 == p -> r + 2 : r + 1); \
    if \
    :: r > last -> r = 0; break \
    :: r <= last \
    fi

/* A rank that has come is found at once; only where that may fail, the word is read, and it is looked for again. */
#define AWAKE(p) x == 0 && !asleep[p]
#ifdef WEAK
#define MAY_FAIL (mem[ARRIVED + r] < step || stale[p * WORDS + ARRIVED + r] != 0)
#else
#define MAY_FAIL mem[ARRIVED + r] < step
#endif

/* Until ranks `r` to `last` but for p have come to `step`; or `lost`: the group has ended, or this rank leaves. */
inline await(last, step) {
    do
        /* SYNC POINT: payload before arrived */
    :: atomic { AWAKE(p) && mem[ARRIVED + r] >= step -> LOOK(last, 0) }
#ifdef MUT_STATE_BEFORE_WORD
    :: atomic { AWAKE(p) -> LOOK(last, 1) }
        load_event(p, EVENT + r);
#else
        /* SYNC POINT: word before state */
    :: atomic { AWAKE(p) && MAY_FAIL -> load_event(p, EVENT + r) }
        atomic { LOOK(last, 1) }
#endif
#ifdef MAY_END
    :: atomic { x == 1 -> load(p, OVER, x); x = x + 2 }
    :: atomic {
        x == 3 ->
#ifndef MUT_NO_LOOK_AGAIN
        load(p, ARRIVED + r, x);
#else
        x = 0;
#endif
        if
        :: x >= step -> HAS_COME(last)
        :: x < step ->
            /* Who has published, and then left or died, fails nobody who waits for that. */
            assert(!(killed[r] || leaver == r + 1) || mem[ARRIVED + r] < step);
            forget_event(p, EVENT + r);
            x = 0;
            r = 0;
            lost = true;
            break
        fi
       }
#ifdef LEAVE
    :: atomic {
        x == 2 && leaver == 0 ->
        leaver = p + 1;
        forget_event(p, EVENT + r);
        x = 0;
        r = 0;
        lost = true;
        break
       }
#endif
    :: atomic { x == 2 -> x = 0; futex_wait(p, EVENT + r) }
#else
    :: atomic { x == 1 -> x = 0; futex_wait(p, EVENT + r) }
#endif
    od
}

/* Of `node_board.require`. What it finds may be old: then this rank goes on, and waits for who does not come. */
#ifdef MAY_END
#define REQUIRE atomic { load(p, OVER, x); if :: x != 0 -> x = 0; break :: x == 0 fi };
#else
#define REQUIRE
#endif

#ifdef MAY_END
#define BREAK_IF_LOST if :: atomic { lost -> lost = false; break } :: !lost fi;
#else
#define BREAK_IF_LOST
#endif

/* ---- steps ----------------------------------------------------------------------------------------------------- */

#ifdef MUT_ONE_AREA
#define AREA(q, step) 2 * q
#else
#define AREA(q, step) 2 * q + ((step) & 1)
#endif

inline read_from(q, step) { if :: q != p -> load_payload(p, AREA(q, step), step) :: q == p fi }

inline read_all(step) {
    atomic {
        read_from(0, step);
        read_from(1, step);
#if RANKS > 2
        read_from(2, step)
#endif
    }
}

#define STEP at[p]
#define SOURCE (kind[STEP] - SEND)

/* All that begin the next step do the same there. The second step of an operation follows on the first. */
inline choose(next) {
    if
    :: kind[next] != 0
    :: kind[next] == 0 && next > STEPS -> kind[next] = STOP
    :: kind[next] == 0 && next <= STEPS && kind[next - 1] == FIRST -> kind[next] = SECOND
    :: kind[next] == 0 && next <= STEPS && kind[next - 1] != FIRST ->
        if
        :: kind[next] = STOP
#if MENU & 1
        :: kind[next] = GATHER
#endif
#if MENU & 2
        :: next < STEPS -> kind[next] = FIRST
#endif
#if MENU & 4
        :: kind[next] = MEET
#endif
#if MENU & 8
        :: kind[next] = SEND
#endif
#if MENU & 16
        :: kind[next] = SEND + 1
#endif
#if RANKS > 2 && (MENU & 32)
        :: kind[next] = SEND + 2
#endif
        fi
    fi
}

inline begin() {
    choose(STEP + 1);
    if
    :: kind[STEP + 1] == STOP -> break
    :: kind[STEP + 1] != STOP ->
        d_step {
            STEP++;
            /* Nobody is more than two steps ahead of another. */
            assert(STEP <= mem[ARRIVED] + 2 && STEP <= mem[ARRIVED + 1] + 2);
#if RANKS > 2
            assert(STEP <= mem[ARRIVED + 2] + 2);
#endif
            if
            :: at[0] >= STEP && at[1] >= STEP && at[RANKS - 1] >= STEP -> kind[STEP - 1] = 0
            :: else
            fi
        }
    fi
}

#ifdef WHATS
#define TELL_WHAT store(p, WHAT_OF(p, STEP), STEP);
#else
#define TELL_WHAT
#endif
#define ARRIVE(fence) \
    TELL_WHAT \
    /* SYNC POINT: payload before arrived */ \
    fence(p, store(p, ARRIVED + p, STEP))

inline announce() {
    /* SYNC POINT: arrived before event */
    F_ARRIVED_BEFORE_EVENT(p, NEW_VALUE(store(p, EVENT + p, 0)));
    atomic { barrier(p); WAKE(EVENT + p) skip }
}

/* `what` of this step stands in the lines of these ranks. Who sent in the last step compares it only now. */
#ifdef WHATS
#define SENT(value) sent = value;
#define COMPARE(q, step) \
    if \
    :: q != p -> atomic { load(p, WHAT_OF(q, step), x); assert(x == step); x = 0 } \
    :: q == p \
    fi;
#if RANKS == 2
#define COMPARE_ALL(step) COMPARE(0, step) COMPARE(1, step)
#else
#define COMPARE_ALL(step) COMPARE(0, step) COMPARE(1, step) COMPARE(2, step)
#endif
#define COMPARE_SENT if :: sent -> COMPARE_ALL(STEP - 1) sent = false :: !sent fi;
#else
#define SENT(value)
#define COMPARE(q, step)
#define COMPARE_ALL(step)
#define COMPARE_SENT
#endif

proctype rank(byte p) {
    byte x, r, reached;
    bool lost;
#ifdef WHATS
    bool sent;
#endif
#ifdef MUT_ARRIVAL_BEFORE_READS
    byte owed;
#endif
    {
        do
        :: atomic { begin() }
#ifdef LEAVE
            if
            :: atomic { leaver == 0 -> leaver = p + 1; break }
            :: true
            fi;
#endif
            if
            :: kind[STEP] <= SECOND || SOURCE == p ->
                REQUIRE
#ifndef MUT_NO_AWAIT_READERS
                r = FIRST_OTHER;
                await(LAST, STEP - 1);
                BREAK_IF_LOST
#endif
                /* SYNC POINT: reads before arrival */
                F_READS_BEFORE_ARRIVAL(p, skip);
                if
                :: kind[STEP] == SECOND -> read_all(STEP - 1)
                :: kind[STEP] != SECOND
                fi;
                COMPARE_SENT
#ifdef MUT_ARRIVED_BEFORE_PAYLOAD
                ARRIVE(F_PAYLOAD_BEFORE_ARRIVED);
                store(p, PAYLOAD + AREA(p, STEP), STEP)
#else
                store(p, PAYLOAD + AREA(p, STEP), STEP);
                ARRIVE(F_PAYLOAD_BEFORE_ARRIVED)
#endif
            :: kind[STEP] == MEET ->
                REQUIRE
                ARRIVE(F_OF_READER)
            :: kind[STEP] >= SEND && SOURCE != p ->
                ARRIVE(F_OF_READER)
            fi;
            announce();
#ifdef MUT_ARRIVAL_BEFORE_READS
            if
            :: owed != 0 -> atomic { read_from(owed - 1, STEP - 1); owed = 0 }
            :: owed == 0
            fi;
#endif
            if
            :: kind[STEP] >= SEND && SOURCE == p -> SENT(true) skip
            :: kind[STEP] >= SEND && SOURCE != p ->
                r = SOURCE;
                await(SOURCE, STEP);
                BREAK_IF_LOST
                COMPARE(SOURCE, STEP)
#ifdef MUT_ARRIVAL_BEFORE_READS
                owed = SOURCE + 1
#else
                atomic { read_from(SOURCE, STEP) }
#endif
            :: kind[STEP] < SEND ->
                r = FIRST_OTHER;
                await(LAST, STEP);
                BREAK_IF_LOST
                COMPARE_ALL(STEP)
                if
                :: kind[STEP] == GATHER || kind[STEP] == SECOND -> read_all(STEP)
                :: kind[STEP] != GATHER && kind[STEP] != SECOND
                fi
            fi
        od;
#ifdef LEAVE
        if
        :: leaver == p + 1 -> end_group()
        :: leaver != p + 1
        fi;
#endif
        atomic { at[p] = STEPS + 1; finished[p] = true }
    } KILLED
}

#if defined(KILL) || defined(RELEASE)
/* A thread that ends the group. A pidfd tells of a death only once all that the dead process stored is visible. */
proctype ender() {
    byte reached;
#ifdef KILL
end_watching:
    killed[KILL] && pending[KILL] == 0;
#endif
    end_group()
}
#endif

init {
    atomic {
        run memory();
        run rank(0);
        run rank(1);
#if RANKS > 2
        run rank(2);
#endif
#if defined(KILL) || defined(RELEASE)
        run ender();
#endif
#ifdef KILL
        run killer(KILL);
#endif
    }
}
